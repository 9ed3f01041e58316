/* A stand-in for libnvidia-ml.so.1, so that pynvml's true ctypes path runs on a machine without a GPU.
 *
 * Everything it answers is a function of the monotonic clock and of a control file, named by NVML_STUB and read again
 * whenever it is replaced. Lines are `SCOPE KEY VALUE...`; SCOPE is a GPU's index, or `nvml` for the library:
 *
 *   nvml init CODE             nvmlInit answers CODE          nvml reload N        a new N: handles and sessions are stale
 *   0 name NVIDIA H100         0 uuid GPU-...                 0 tick SECONDS       the counter's period
 *   0 average SECONDS          averaging window of the power sensor's average and of nvmlDeviceGetPowerUsage
 *   0 noise RATIO              of the power sensor (uniform)  0 gain RATIO         the power sensor's error
 *   0 since SECONDS JOULES     the counter stood at JOULES at that time
 *   0 watts SECONDS WATTS      from then on; in order of time
 *   0 stuck 1                  the counter does not move      0 delay SECONDS      every reading takes so long
 *   0 mig 1                    0 mig_uuid MIG-...             0 virtualization MODE
 *   0 process PID PERCENT      uses the GPU now
 *   0 fault WHAT CODE          WHAT: any handle fields energy_field energy_call instant_gpu instant_module average_gpu
 *                              average_module power_usage utilization
 *
 * Compiled with -DWITHOUT_FIELDS it lacks nvmlDeviceGetFieldValues, as an old driver's library does.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       GPU_IS_LOST = 15 };
enum { MAX_GPUS = 16, MAX_POINTS = 16384, MAX_PROCESSES = 64 };
enum { FIELD_ENERGY = 83, FIELD_AVERAGE = 185, FIELD_INSTANT = 186 };

static const char *const FAULTS[] = {"any", "handle", "fields", "energy_field", "energy_call", "instant_gpu",
    "instant_module", "average_gpu", "average_module", "power_usage", "utilization"};
enum { ANY, HANDLE, FIELDS, ENERGY_FIELD, ENERGY_CALL, INSTANT_GPU, INSTANT_MODULE, AVERAGE_GPU, AVERAGE_MODULE,
       POWER_USAGE, UTILIZATION, FAULT_COUNT };

typedef struct { double at, watts, joules; } Point;
typedef struct { unsigned pid, percent; } Process;
typedef struct {
    char name[96], uuid[96], mig_uuid[96];
    double tick, average, noise, gain, since, offset, delay, stuck_at;
    int stuck, mig, faults[FAULT_COUNT], points_count, process_count;
    unsigned long long virtualization;
    Point points[MAX_POINTS];
    Process processes[MAX_PROCESSES];
} Gpu;

static Gpu gpus[MAX_GPUS];
static int gpu_count, init_fault, reload, session, sessions;
static struct stat seen;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void pause_for(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    if (seconds > 0) nanosleep(&t, NULL);
}

static void add_point(Gpu *g, double at, double watts) {
    if (g->points_count == MAX_POINTS) abort();
    Point *p = &g->points[g->points_count];
    p->at = at, p->watts = watts, p->joules = 0;
    if (g->points_count) p->joules = p[-1].joules + p[-1].watts * (at - p[-1].at);
    g->points_count++;
}

static void set_fault(Gpu *g, const char *what, int code) {
    for (int i = 0; i < FAULT_COUNT; i++) if (!strcmp(what, FAULTS[i])) g->faults[i] = code;
}

static void set(Gpu *g, const char *key, const char *value) {
    double a = 0, b = 0;
    char word[32] = "";
    sscanf(value, "%lf %lf", &a, &b);
    if (!strcmp(key, "name")) snprintf(g->name, sizeof g->name, "%s", value);
    else if (!strcmp(key, "uuid")) snprintf(g->uuid, sizeof g->uuid, "%s", value);
    else if (!strcmp(key, "mig_uuid")) snprintf(g->mig_uuid, sizeof g->mig_uuid, "%s", value);
    else if (!strcmp(key, "tick")) g->tick = a;
    else if (!strcmp(key, "average")) g->average = a;
    else if (!strcmp(key, "noise")) g->noise = a;
    else if (!strcmp(key, "gain")) g->gain = a;
    else if (!strcmp(key, "delay")) g->delay = a;
    else if (!strcmp(key, "since")) g->since = a, g->offset = b;
    else if (!strcmp(key, "watts")) add_point(g, a, b);
    else if (!strcmp(key, "stuck")) g->stuck = a != 0, g->stuck_at = a;
    else if (!strcmp(key, "mig")) g->mig = (int)a;
    else if (!strcmp(key, "virtualization")) g->virtualization = (unsigned long long)a;
    else if (!strcmp(key, "process") && g->process_count < MAX_PROCESSES)
        g->processes[g->process_count++] = (Process){(unsigned)a, (unsigned)b};
    else if (!strcmp(key, "fault") && sscanf(value, "%31s %lf", word, &b) == 2) set_fault(g, word, (int)b);
}

static void parse(FILE *file) {
    char line[512], scope[16], key[32];
    memset(gpus, 0, sizeof gpus);
    gpu_count = init_fault = reload = 0;
    while (fgets(line, sizeof line, file)) {
        int at = 0;
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%15s %31s %n", scope, key, &at) < 2) continue;
        if (!strcmp(scope, "nvml")) {
            if (!strcmp(key, "init")) init_fault = atoi(line + at);
            if (!strcmp(key, "reload")) reload = atoi(line + at);
            continue;
        }
        int index = atoi(scope);
        if (index < 0 || index >= MAX_GPUS) continue;
        if (index >= gpu_count) gpu_count = index + 1;
        set(&gpus[index], key, line + at);
    }
}

static void refresh(void) {
    const char *path = getenv("NVML_STUB");
    struct stat s;
    if (!path || stat(path, &s)) return;
    if (s.st_ino == seen.st_ino && s.st_mtim.tv_sec == seen.st_mtim.tv_sec && s.st_mtim.tv_nsec == seen.st_mtim.tv_nsec
        && s.st_size == seen.st_size) return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    fstat(fileno(file), &seen);
    parse(file);
    fclose(file);
}

/* Joules since the first point. */
static double integral(const Gpu *g, double t) {
    int low = 0, high = g->points_count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (g->points[middle].at <= t) low = middle + 1; else high = middle;
    }
    return low ? g->points[low - 1].joules + g->points[low - 1].watts * (t - g->points[low - 1].at) : 0;
}

static unsigned long long counter_mj(const Gpu *g) {
    double t = g->stuck ? g->stuck_at : now();
    if (g->tick > 0) t = (double)(long long)(t / g->tick) * g->tick;
    double joules = g->offset + integral(g, t) - integral(g, g->since);
    if (joules < g->offset) joules = g->offset;
    return (unsigned long long)(joules * 1000);
}

static double noisy(const Gpu *g, double watts, double t) {
    uint64_t h = (uint64_t)(t * 1000) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 31, h *= 0xBF58476D1CE4E5B9ull, h ^= h >> 29;
    double uniform = (double)(h >> 11) / (double)(1ull << 53) * 2 - 1;
    return watts * (g->gain > 0 ? g->gain : 1) * (1 + g->noise * uniform);
}

static double watts_over(const Gpu *g, double window) {
    double t = now();
    return noisy(g, (integral(g, t) - integral(g, t - window)) / window, t);
}

static unsigned milliwatts(const Gpu *g, int average) {
    return (unsigned)(watts_over(g, average && g->average > 0 ? g->average : 0.001) * 1000);
}

typedef struct Handle *nvmlDevice_t;

/* A handle is its GPU's index and the driver's generation, so that a stale one is found out. */
static nvmlDevice_t handle_of(int index) { return (nvmlDevice_t)(intptr_t)(1 + index + 1024 * (intptr_t)(1 + reload)); }

static int check(nvmlDevice_t handle, Gpu **gpu) {
    refresh();
    if (!sessions) return UNINITIALIZED;
    if (session != reload) return GPU_IS_LOST;
    intptr_t value = (intptr_t)handle, index = value % 1024 - 1;
    if (value / 1024 != 1 + reload || index < 0 || index >= gpu_count) return INVALID_ARGUMENT;
    *gpu = &gpus[index];
    pause_for((*gpu)->delay);
    return (*gpu)->faults[ANY];
}

#define GPU(handle) Gpu *g; int code = check(handle, &g); if (code) return code

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    refresh();
    if (init_fault) return init_fault;
    if (!sessions++) session = reload;
    return SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    if (!sessions) return UNINITIALIZED;
    sessions--;
    return SUCCESS;
}
const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "999.0"); return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    refresh();
    if (!sessions) return UNINITIALIZED;
    *count = gpu_count;
    return SUCCESS;
}
static int open_device(int index, nvmlDevice_t *handle) {
    int fault = gpus[index].faults[ANY] ? gpus[index].faults[ANY] : gpus[index].faults[HANDLE];
    if (!fault) *handle = handle_of(index);
    return fault;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *handle) {
    refresh();
    if (!sessions) return UNINITIALIZED;
    if (session != reload) return GPU_IS_LOST;
    return index < (unsigned)gpu_count ? open_device((int)index, handle) : INVALID_ARGUMENT;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *handle) {
    refresh();
    if (!sessions) return UNINITIALIZED;
    if (session != reload) return GPU_IS_LOST;
    for (int i = 0; i < gpu_count; i++)
        if (!strcmp(uuid, gpus[i].uuid) || (gpus[i].mig && !strcmp(uuid, gpus[i].mig_uuid))) return open_device(i, handle);
    return NOT_FOUND;
}
int nvmlDeviceGetName(nvmlDevice_t h, char *text, unsigned length) {
    GPU(h);
    snprintf(text, length, "%s", g->name);
    return SUCCESS;
}
int nvmlDeviceGetUUID(nvmlDevice_t h, char *text, unsigned length) {
    GPU(h);
    snprintf(text, length, "%s", g->uuid);
    return SUCCESS;
}
int nvmlDeviceGetIndex(nvmlDevice_t h, unsigned *index) { GPU(h); *index = (unsigned)(g - gpus); return SUCCESS; }
int nvmlDeviceGetMigMode(nvmlDevice_t h, unsigned *current, unsigned *pending) {
    GPU(h);
    *current = *pending = (unsigned)g->mig;
    return SUCCESS;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t h, nvmlDevice_t *parent) {
    GPU(h);
    *parent = h;
    return g->mig ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetVirtualizationMode(nvmlDevice_t h, unsigned long long *mode) {
    GPU(h);
    *mode = g->virtualization;
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t h, unsigned long long *mj) {
    GPU(h);
    if (g->faults[ENERGY_CALL]) return g->faults[ENERGY_CALL];
    *mj = counter_mj(g);
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(nvmlDevice_t h, unsigned *mw) {
    GPU(h);
    if (g->faults[POWER_USAGE]) return g->faults[POWER_USAGE];
    *mw = milliwatts(g, 1);
    return SUCCESS;
}

#ifndef WITHOUT_FIELDS
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, code;
    union { double d; unsigned u; unsigned long long ull; } value;
} FieldValue;

static void answer(const Gpu *g, FieldValue *v) {
    int power = v->field == FIELD_INSTANT ? INSTANT_GPU : v->field == FIELD_AVERAGE ? AVERAGE_GPU : -1;
    if (v->field == FIELD_ENERGY) {
        v->type = 3, v->code = g->faults[ENERGY_FIELD], v->value.ull = counter_mj(g);
    } else if (power >= 0 && v->scope <= 1) {
        v->type = 1, v->code = g->faults[power + (int)v->scope], v->value.u = milliwatts(g, v->field == FIELD_AVERAGE);
    } else {
        v->code = NOT_SUPPORTED;
    }
    if (v->code) v->value.ull = 0;
}
int nvmlDeviceGetFieldValues(nvmlDevice_t h, int count, FieldValue *values) {
    GPU(h);
    if (g->faults[FIELDS]) return g->faults[FIELDS];
    for (int i = 0; i < count; i++) answer(g, &values[i]);
    return SUCCESS;
}
#endif

typedef struct { unsigned pid; unsigned long long at; unsigned sm, memory, encoder, decoder; } Utilization;

int nvmlDeviceGetProcessUtilization(nvmlDevice_t h, Utilization *samples, unsigned *count, unsigned long long since) {
    GPU(h);
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    unsigned long long at = (unsigned long long)t.tv_sec * 1000000 + (unsigned long long)t.tv_nsec / 1000;
    if (g->faults[UTILIZATION]) return g->faults[UTILIZATION];
    if (g->mig) return NOT_SUPPORTED;
    if (!g->process_count || at <= since) return NOT_FOUND;
    if (!samples || *count < (unsigned)g->process_count) {
        *count = (unsigned)g->process_count;
        return INSUFFICIENT_SIZE;
    }
    *count = (unsigned)g->process_count;
    for (int i = 0; i < g->process_count; i++)
        samples[i] = (Utilization){g->processes[i].pid, at, g->processes[i].percent, 0, 0, 0};
    return SUCCESS;
}
