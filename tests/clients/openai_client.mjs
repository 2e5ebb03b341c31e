// Every surface of a running server, through the official `openai` npm client.
//
//   node openai_client.mjs BASE_URL MODEL [ENCODER_BASE_URL ENCODER_MODEL]
//
// Lies beside a node_modules folder that holds `openai`. Prints a line of JSON for each check: its name, whether it
// held, seconds, and what went wrong or was seen. Ends with 1 when one did not hold.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const [baseURL, model, encoderURL, encoder] = process.argv.slice(2);
const settings = { apiKey: "none", maxRetries: 0, timeout: 120_000 };
const client = new OpenAI({ ...settings, baseURL });
const question = [{ role: "user", content: "What is the weather in Paris right now?" }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
const weather = {
  type: "function",
  function: { name: "get_weather", description: "Get the current weather of a city", strict: true, parameters },
};
const country = {
  type: "object",
  properties: { capital: { type: "string", maxLength: 20 }, in_europe: { type: "boolean" } },
  required: ["capital", "in_europe"],
  additionalProperties: false,
};

async function collect(stream) {
  const all = [];
  for await (const item of stream) all.push(item);
  return all;
}

const checks = {
  async models() {
    const listed = await collect(await client.models.list());
    assert.deepEqual(listed.map((card) => card.id), [model]);
    const card = await client.models.retrieve(model);
    assert.equal(card.id, model);
    await assert.rejects(client.models.retrieve("another"), OpenAI.NotFoundError);
  },

  async chat() {
    const asked = {
      model, messages: [{ role: "user", content: "What is the capital of France?" }], temperature: 0, max_tokens: 24,
    };
    const whole = await client.chat.completions.create(asked);
    const { message, finish_reason } = whole.choices[0];
    assert.match(message.content, /Paris/);
    assert.equal(finish_reason, "stop");
    assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await collect(await client.chat.completions.create({ ...asked, ...options }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), message.content);
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
    const helped = client.chat.completions.stream({ ...asked, logprobs: true, top_logprobs: 2 });
    let streamed = "";
    helped.on("content", (delta) => (streamed += delta));
    const final = await helped.finalChatCompletion();
    assert.equal(streamed, message.content);
    assert.equal(final.choices[0].logprobs.content.length, whole.usage.completion_tokens);
    return message.content;
  },

  async "a stream in single bytes"() {
    const bytewise = new OpenAI({
      ...settings, baseURL,
      fetch: async (url, init) => {
        const response = await fetch(url, init);
        const single = new TransformStream({
          transform: (chunk, out) => chunk.forEach((byte) => out.enqueue(Uint8Array.of(byte))),
        });
        return new Response(response.body.pipeThrough(single), response);
      },
    });
    const messages = [{ role: "user", content: "Say exactly: Grüße, 日本 😀" }];
    const asked = { model, messages, temperature: 0, max_tokens: 24 };
    const whole = await client.chat.completions.create(asked);
    const chunks = await collect(await bytewise.chat.completions.create({ ...asked, stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
    return whole.choices[0].message.content;
  },

  async "a stream that is left"() {
    const stream = await client.chat.completions.create({ model, messages: question, stream: true, max_tokens: 400 });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    const again = await client.chat.completions.create({ model, messages: question, max_tokens: 1 });
    assert.equal(again.usage.completion_tokens, 1);
  },

  async "tool loop"() {
    const called = [];
    const get_weather = ({ city }) => {
      called.push(city);
      return '{"temperature": "17 degrees", "sky": "rain"}';
    };
    const tool = { ...weather.function, function: get_weather, parse: JSON.parse };
    const asked = { model, messages: question, temperature: 0, max_tokens: 60, parallel_tool_calls: false };
    // So small a model goes on calling while it may: the runner's loop ends after the second turn.
    const runner = client.chat.completions.runTools(
      { ...asked, stream: true, tools: [{ type: "function", function: tool }] }, { maxChatCompletions: 2 },
    );
    const deltas = [];
    runner.on("tool_calls.function.arguments.delta", (event) => deltas.push(event.arguments_delta));
    await runner.done();
    assert.equal(called[0], "Paris");
    assert.ok(deltas.length > 2, "the arguments came in one piece");
    assert.ok(deltas.join("").startsWith('{"city": "Paris"}'), deltas.join(""));
    const messages = runner.messages.slice(0, 3);
    assert.deepEqual(messages.map((one) => one.role), ["user", "assistant", "tool"]);
    const report = {
      type: "object",
      properties: { degrees: { type: "integer" }, sky: { type: "string", maxLength: 20 } },
      required: ["degrees", "sky"],
      additionalProperties: false,
    };
    const last = client.chat.completions.stream({
      ...asked, messages, tools: [weather], tool_choice: "none",
      response_format: { type: "json_schema", json_schema: { name: "report", strict: true, schema: report } },
    });
    const { choices: [choice] } = await last.finalChatCompletion();
    assert.deepEqual(JSON.parse(choice.message.content), { degrees: 17, sky: "rain" });
    return called;
  },

  async "forced tools"() {
    const clock = { type: "function", function: { name: "clock", parameters: { type: "object", properties: {} } } };
    const asked = { model, messages: question, temperature: 0, max_tokens: 60, tools: [weather, clock] };
    const named = { type: "function", function: { name: "clock" } };
    for (const [choice, name] of [["required", undefined], [named, "clock"]]) {
      const answer = await client.chat.completions.create(
        { ...asked, tool_choice: choice, parallel_tool_calls: false },
      );
      const [call] = answer.choices[0].message.tool_calls;
      assert.ok(name === undefined || call.function.name === name);
      assert.equal(typeof JSON.parse(call.function.arguments), "object");
    }
    const none = await client.chat.completions.create({ ...asked, tool_choice: "none", max_tokens: 8 });
    assert.equal(none.choices[0].message.tool_calls, undefined);
  },

  async "structured output"() {
    const parsed = await client.chat.completions.parse({
      model, messages: [{ role: "user", content: "Describe France as JSON." }], temperature: 0, max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "country", strict: true, schema: country } },
    });
    const value = JSON.parse(parsed.choices[0].message.content);
    assert.deepEqual(value, { capital: "Paris", in_europe: true });
    const object = await client.chat.completions.create({
      model, messages: [{ role: "user", content: "A small JSON object, please." }], max_tokens: 200, temperature: 0,
      response_format: { type: "json_object" },
    });
    assert.equal(typeof JSON.parse(object.choices[0].message.content), "object");
    const broken = { type: "json_schema", json_schema: { name: "x", schema: { type: "strin" } } };
    await assert.rejects(
      client.chat.completions.create({ model, messages: question, response_format: broken }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "response_format",
    );
    return value;
  },

  async completions() {
    const asked = { model, prompt: "def add(a, b):\n    return", max_tokens: 8, temperature: 0 };
    const whole = await client.completions.create({ ...asked, logprobs: 2, echo: true });
    const { text, logprobs } = whole.choices[0];
    assert.match(text, /return a \+ b/);
    assert.equal(logprobs.tokens.length, whole.usage.total_tokens);
    assert.equal(logprobs.token_logprobs[0], null);
    const chunks = await collect(await client.completions.create({ ...asked, stream: true }));
    assert.equal(asked.prompt + chunks.map((chunk) => chunk.choices[0].text).join(""), text);
    const two = await client.completions.create({ ...asked, prompt: ["one two", "three four"], max_tokens: 2 });
    assert.deepEqual(two.choices.map((choice) => choice.index), [0, 1]);
  },

  async responses() {
    const asked = {
      model, input: "What is the capital of France?", temperature: 0, max_output_tokens: 24, metadata: { topic: "geo" },
    };
    const made = await client.responses.create(asked);
    assert.match(made.output_text, /Paris/);
    assert.equal(made.status, "completed");
    const kept = await client.responses.retrieve(made.id);
    assert.equal(kept.output_text ?? kept.output[0].content[0].text, made.output_text);
    const items = await collect(await client.responses.inputItems.list(made.id));
    assert.equal(items[0].content[0].text, asked.input);
    const stream = client.responses.stream(asked);
    let text = "";
    const kinds = [];
    for await (const event of stream) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, made.output_text);
    assert.equal((await stream.finalResponse()).output_text, made.output_text);
    assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
    const next = await client.responses.create(
      { ...asked, input: "And of Italy?", previous_response_id: made.id },
    );
    assert.equal(next.previous_response_id, made.id);
    assert.match(next.output_text, /Rome/);
    const value = await client.responses.create({
      ...asked, input: "Describe France as JSON.", max_output_tokens: 60,
      text: { format: { type: "json_schema", name: "country", strict: true, schema: country } },
    });
    assert.equal(JSON.parse(value.output_text).capital, "Paris");
    await client.responses.delete(made.id);
    await assert.rejects(client.responses.retrieve(made.id), OpenAI.NotFoundError);
  },

  async "tools in responses"() {
    const tools = [{ type: "function", ...weather.function }];
    const asked = { model, temperature: 0, max_output_tokens: 60, tools };
    const stream = client.responses.stream({ ...asked, input: question, tool_choice: "required", parallel_tool_calls: false });
    let args = "";
    stream.on("response.function_call_arguments.delta", (event) => (args += event.delta));
    const first = await stream.finalResponse();
    const call = first.output.find((item) => item.type === "function_call");
    assert.equal(call.name, "get_weather");
    assert.equal(args, call.arguments);
    const output = { type: "function_call_output", call_id: call.call_id, output: "17 degrees, rain" };
    const second = await client.responses.create(
      { ...asked, input: [output], previous_response_id: first.id, tool_choice: "none" },
    );
    assert.match(second.output_text, /17|rain/i);
  },

  async "background responses and conversations"() {
    const conversation = await client.conversations.create({ metadata: { a: "b" } });
    let made = await client.responses.create({
      model, input: "Say hello.", max_output_tokens: 8, background: true, conversation: conversation.id,
    });
    assert.ok(["queued", "in_progress"].includes(made.status));
    while (["queued", "in_progress"].includes(made.status)) {
      await new Promise((resolve) => setTimeout(resolve, 50));
      made = await client.responses.retrieve(made.id);
    }
    const items = await collect(await client.conversations.items.list(conversation.id));
    assert.equal(items.length, 2);
    const long = await client.responses.create({ model, input: "Count.", max_output_tokens: 500, background: true });
    assert.equal((await client.responses.cancel(long.id)).status, "cancelled");
    assert.equal((await client.conversations.delete(conversation.id)).deleted, true);
  },

  async "files and batches"() {
    const line = (i) => JSON.stringify({
      custom_id: `${i}`, method: "POST", url: "/v1/chat/completions",
      body: { model, messages: [{ role: "user", content: `Say ${i}.` }], max_tokens: 4 },
    });
    const text = [0, 1, 2].map(line).join("\n");
    const file = await client.files.create({ file: await toFile(Buffer.from(text), "in.jsonl"), purpose: "batch" });
    assert.equal(await (await client.files.content(file.id)).text(), text);
    assert.ok((await collect(await client.files.list())).some((entry) => entry.id === file.id));
    let batch = await client.batches.create(
      { input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" },
    );
    while (["validating", "in_progress", "finalizing"].includes(batch.status)) {
      await new Promise((resolve) => setTimeout(resolve, 50));
      batch = await client.batches.retrieve(batch.id);
    }
    assert.equal(batch.status, "completed");
    assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });
    const lines = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n");
    assert.deepEqual(lines.map((one) => JSON.parse(one).custom_id).sort(), ["0", "1", "2"]);
    assert.equal((await client.files.delete(file.id)).deleted, true);
    await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
  },

  async errors() {
    const wrong = (fields) => client.chat.completions.create({ model, messages: question, ...fields });
    await assert.rejects(
      wrong({ top_p: 9 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "top_p",
    );
    await assert.rejects(wrong({ model: "another" }), OpenAI.NotFoundError);
    await assert.rejects(wrong({ temperature: -1, stream: true }), OpenAI.BadRequestError);
  },

  async embeddings() {
    if (!encoderURL) return "skipped: no encoder";
    const vectors = new OpenAI({ ...settings, baseURL: encoderURL });
    const input = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell."];
    const asked = { model: encoder, input };
    const { data, usage } = await vectors.embeddings.create(asked); // the client asks for base64 and decodes it
    const plain = await vectors.embeddings.create({ ...asked, encoding_format: "float" });
    const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
    const [cat, kitten, stocks] = data.map((one) => one.embedding);
    assert.ok(Math.abs(dot(cat, cat) - 1) < 1e-5);
    assert.ok(dot(cat, kitten) > 0.5 && dot(cat, stocks) < 0.2);
    plain.data.forEach((one, i) =>
      one.embedding.forEach((x, j) => assert.ok(Math.abs(x - data[i].embedding[j]) < 1e-6)));
    assert.ok(usage.prompt_tokens > 10);
    const short = await vectors.embeddings.create({ ...asked, dimensions: 64 });
    assert.equal(short.data[0].embedding.length, 64);
    return `${cat.length} elements`;
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  const began = performance.now();
  const report = { name, ok: true };
  try {
    const seen = await check();
    if (seen !== undefined) report.seen = seen;
  } catch (error) {
    failed += 1;
    Object.assign(report, { ok: false, error: String(error.stack ?? error).slice(0, 1500) });
  }
  console.log(JSON.stringify({ ...report, seconds: Math.round(performance.now() - began) / 1000 }));
}
process.exitCode = failed ? 1 : 0;
