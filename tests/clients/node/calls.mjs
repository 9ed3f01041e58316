// The usual calls of the OpenAI library for Node, against the proxy at URL; prints what came of each as one JSON object.
//
//     node calls.mjs URL NODE_MODULES
//
// Each call tells its answer, the energy that the library shows (`energy`, where it has a place for it), and from the
// answer's head the request's id and the energy's status and joules. `comment` is the energy comment of a raw stream.

import { pathToFileURL } from 'node:url';

const [url, modules] = process.argv.slice(2);
const load = (path) => import(pathToFileURL(`${modules}/${path}`).href);
const { default: OpenAI, toFile } = await load('openai/index.mjs');
const { zodResponseFormat } = await load('openai/helpers/zod.mjs');
const { z } = await load('zod/index.js');

let heads = [];
const watched = async (...request) => {
  const response = await fetch(...request);
  if (String(request[0]).startsWith(url)) heads.push(response.headers); // it also tries out what fetch can do
  return response;
};
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0, fetch: watched });
const messages = [{ role: 'user', content: 'hi [[tokens=6]]' }];
const weather = {
  type: 'function',
  function: { name: 'weather', parameters: { type: 'object', properties: {} }, parse: JSON.parse, function: () => 'fine' },
};

const head = (headers) => ({
  id: headers.get('x-request-id'),
  status: headers.get('x-energy-status'),
  joules: headers.get('x-energy-joules'),
});
const text = async (stream) => {
  let found = '';
  let energy = null;
  for await (const chunk of stream) {
    found += chunk.choices[0]?.delta.content ?? '';
    energy = chunk.energy ?? energy;
  }
  return { answer: found, energy };
};
const failure = async (doing) => {
  try {
    await doing();
  } catch (error) {
    return { answer: { name: error.constructor.name, status: error.status, code: error.code, param: error.param } };
  }
  return { answer: 'it did not fail' };
};

const calls = {
  chat: async () => {
    const answer = await client.chat.completions.create({ model: 'chat', messages });
    return { answer: answer.choices[0].message.content, usage: answer.usage, energy: answer.energy };
  },
  stream: async () => text(await client.chat.completions.create({ model: 'chat', messages, stream: true })),
  stream_with_usage: async () =>
    text(
      await client.chat.completions.create({
        model: 'chat', messages, stream: true, stream_options: { include_usage: true },
      }),
    ),
  stream_left_early: async () => {
    const stream = await client.chat.completions.create({
      model: 'chat', messages: [{ role: 'user', content: 'hi [[tokens=2000 token_ms=10]]' }], stream: true,
    });
    for await (const chunk of stream) return { answer: chunk.object };
  },
  raw_stream: async () => {
    const response = await client.chat.completions.create({ model: 'chat', messages, stream: true }).asResponse();
    const lines = (await response.text()).trimEnd().split('\n');
    const comment = lines.find((line) => line.startsWith(': energy '));
    return { answer: lines.at(-1), comment: JSON.parse(comment.slice(9)) };
  },
  stream_helper: async () => {
    const runner = client.chat.completions.stream({ model: 'chat', messages });
    return { answer: await runner.finalContent() };
  },
  tools: async () => {
    const answer = await client.chat.completions.create({ model: 'chat', messages, tools: [weather] });
    const [call] = answer.choices[0].message.tool_calls;
    return { answer: [answer.choices[0].finish_reason, call.function], energy: answer.energy };
  },
  tools_run: async () => {
    const runner = client.chat.completions.runTools({ model: 'chat', messages, tools: [weather] });
    return { answer: [await runner.finalContent(), runner.messages.map((message) => message.role)] };
  },
  tools_streamed: async () => {
    const runner = client.chat.completions.runTools({ model: 'chat', messages, tools: [weather], stream: true });
    return { answer: await runner.finalContent() };
  },
  structured: async () => {
    const shape = z.object({ reason: z.string(), conclusion: z.string() });
    const answer = await client.chat.completions.parse({
      model: 'chat', messages, response_format: zodResponseFormat(shape, 'answered'),
    });
    return { answer: answer.choices[0].message.parsed, energy: answer.energy };
  },
  completion: async () => {
    const answer = await client.completions.create({ model: 'chat', prompt: 'hi [[tokens=3]]' });
    return { answer: answer.choices[0].text, energy: answer.energy };
  },
  responses: async () => {
    const answer = await client.responses.create({ model: 'chat', input: 'hi [[tokens=3]]' });
    return { answer: answer.output_text, energy: answer.energy };
  },
  responses_streamed: async () => {
    const stream = client.responses.stream({ model: 'chat', input: 'hi [[tokens=3]]' });
    const answer = await stream.finalResponse();
    return { answer: answer.output_text, energy: answer.energy };
  },
  embeddings: async () => {
    const answer = await client.embeddings.create({ model: 'chat', input: ['one', 'two'] });
    return { answer: answer.data.map((row) => row.embedding.map((x) => x.toFixed(1))), energy: answer.energy };
  },
  moderations: async () => {
    const answer = await client.moderations.create({ input: 'a kind word' });
    return { answer: answer.results[0].flagged, energy: answer.energy };
  },
  images: async () => {
    const answer = await client.images.generate({ model: 'painter', prompt: 'a red apple', n: 2 });
    return { answer: answer.data.map((row) => atob(row.b64_json).slice(1, 4)), energy: answer.energy };
  },
  images_streamed: async () => {
    const stream = await client.images.generate({ model: 'painter', prompt: 'a red apple', stream: true });
    for await (const event of stream) return { answer: event.type, energy: event.energy };
  },
  image_edit: async () => {
    const image = await toFile(Buffer.from('a picture'), 'cat.png', { type: 'image/png' });
    const answer = await client.images.edit({ model: 'painter', image, prompt: 'a hat' });
    return { answer: atob(answer.data[0].b64_json), energy: answer.energy };
  },
  transcription: async () => {
    const answer = await client.audio.transcriptions.create({
      model: 'chat', file: await toFile(Buffer.from('RIFF'), 'a.wav'),
    });
    return { answer: answer.text, energy: answer.energy };
  },
  speech: async () => {
    const answer = await client.audio.speech.create({ model: 'chat', voice: 'alloy', input: 'hello' });
    return { answer: Buffer.from(await answer.arrayBuffer()).toString() };
  },
  models: async () => {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    return { answer: [found, (await client.models.retrieve('chat')).id] };
  },
  request_id: async () => {
    const { data, request_id } = await client.chat.completions.create({ model: 'chat', messages }).withResponse();
    return { answer: data._request_id === request_id };
  },
  no_such_model: () => failure(() => client.chat.completions.create({ model: 'nope', messages })),
  bad_request: () => failure(() => client.chat.completions.create({ model: 'chat', messages: 'hi' })),
  rate_limit: () =>
    failure(() =>
      client.chat.completions.create({ model: 'chat', messages: [{ role: 'user', content: '[[status=429]]' }] }),
    ),
  broken_stream: () =>
    failure(async () =>
      text(
        await client.chat.completions.create({
          model: 'chat', messages: [{ role: 'user', content: 'hi [[tokens=20 cut_after=3]]' }], stream: true,
        }),
      ),
    ),
  retries: () =>
    failure(() =>
      client.chat.completions.create(
        { model: 'chat', messages: [{ role: 'user', content: '[[status=500]]' }] }, { maxRetries: 2 },
      ),
    ),
};

const told = {};
for (const [name, call] of Object.entries(calls)) {
  heads = [];
  const found = await call().catch((error) => ({ answer: `${error.stack}` }));
  told[name] = { ...found, heads: heads.map(head) };
}
console.log(JSON.stringify(told));
