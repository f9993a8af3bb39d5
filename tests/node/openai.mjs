// OpenAI's client for JavaScript, as people use it: `node openai.mjs WHAT`, with URL, KEY and MODEL in the environment,
// prints one JSON value.

import OpenAI from "openai";

const { URL: baseURL, KEY: apiKey, MODEL: model } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of Japan?" }];
const brief = { model, temperature: 0, max_tokens: 20 };

const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather",
      parameters: {
        type: "object",
        properties: { city: { enum: ["Oslo", "Rome"] } },
        required: ["city"],
        additionalProperties: false,
      },
    },
  },
];

async function failure(asked) {
  try {
    await asked;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param, id: error.requestID };
  }
}

const all = {
  async chat() {
    const done = await client.chat.completions.create({ ...brief, messages });
    return { text: done.choices[0].message.content, finish: done.choices[0].finish_reason, usage: done.usage };
  },

  async stream() {
    const stream = await client.chat.completions.create({
      ...brief,
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    const texts = [];
    let usage;
    for await (const chunk of stream) {
      texts.push(chunk.choices[0]?.delta.content ?? "");
      usage = chunk.usage ?? usage;
    }
    return { text: texts.join(""), pieces: texts.filter(Boolean).length, usage };
  },

  async completion() {
    const asked = { ...brief, prompt: "The capital of France is", stop: "\n" };
    const done = await client.completions.create(asked);
    const texts = [];
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) texts.push(chunk.choices[0].text);
    return { text: done.choices[0].text, streamed: texts.join("") };
  },

  async responses() {
    const asked = { model, temperature: 0, max_output_tokens: 20, input: messages };
    const done = await client.responses.create(asked);
    const deltas = [];
    for await (const event of await client.responses.create({ ...asked, stream: true }))
      if (event.type === "response.output_text.delta") deltas.push(event.delta);
    return { text: done.output_text, streamed: deltas.join("") };
  },

  async models() {
    const names = [];
    for await (const { id } of client.models.list()) names.push(id);
    return names;
  },

  async errors() {
    const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    return {
      value: await failure(client.chat.completions.create({ ...brief, messages, temperature: -1 })),
      model: await failure(client.chat.completions.create({ ...brief, messages, model: "other" })),
      key: await failure(stranger.models.list()),
      stream: await failure(client.chat.completions.create({ ...brief, messages: [], stream: true })),
    };
  },

  // A reader who leaves after the first piece.
  async abort() {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 400, ignore_eos: true, stream: true });
    let pieces = 0;
    for await (const chunk of stream) {
      if (chunk.choices[0]?.delta.content && ++pieces === 2) stream.controller.abort();
    }
    return pieces;
  },

  async tools() {
    const asked = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 100 };
    const runner = client.chat.completions.stream(asked);
    let deltas = 0;
    runner.on("tool_calls.function.arguments.delta", () => deltas++);
    const message = await runner.finalMessage();
    const [call] = message.tool_calls;
    const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
    const after = await client.chat.completions.create({
      model,
      messages: [...messages, message, result],
      tools,
      max_tokens: 4,
    });
    return { name: call.function.name, arguments: call.function.arguments, deltas, after: after.usage.completion_tokens };
  },
};

console.log(JSON.stringify(await all[process.argv[2]]()));
