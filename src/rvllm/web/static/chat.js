// The playground: a conversation over /v1/chat/completions.

import { Answer } from "./answer.js";
import { events, key, request } from "./api.js";
import { byId, el } from "./dom.js";
import { Saved } from "./saved.js";
import { asCurl, bodyOf, field, startSettings } from "./settings.js";

let conversation = [];
let saved = null;
let running = null;  // AbortController of the answer in progress
let report = () => {};

export function startChat(onError) {
  report = onError;
  const prompt = byId("prompt");
  startSettings();
  saved = new Saved(reopen);
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  prompt.addEventListener("input", () => grow(prompt));
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) stop(); });
  if (matchMedia("(max-width: 760px)").matches) byId("settings").open = false;
  showWelcome();
}

function showWelcome() {
  const ideas = ["Explain what a KV cache is, in three sentences.", "Write a haiku about memory bandwidth.",
    "A Python function that merges two sorted lists."];
  byId("log").replaceChildren(el("div", { class: "welcome" },
    el("h1", {}, "Talk to the model"),
    el("p", {}, "Nothing leaves this server. Settings left empty are the model's own."),
    ...ideas.map((idea) => el("button", { type: "button", onclick: () => { byId("prompt").value = idea; send(); } }, idea))));
}

function clear() {
  stop();
  conversation = [];
  saved.id = null;
  saved.draw();
  showWelcome();
  byId("prompt").focus();
}

// Shows a kept conversation, to go on with it.
function reopen(messages) {
  stop();
  conversation = [...messages];
  byId("log").replaceChildren();
  messages.forEach((message, i) => {
    if (message.role === "assistant") {
      const answer = shown(false, messages.slice(0, i));
      answer.text = message.content || "";
      answer.calls = (message.tool_calls || []).map((call) => ({ id: call.id, ...call.function }));
      answer.end(null);
    } else showSaid(message.content, message.role);
  });
  byId("log").scrollTop = byId("log").scrollHeight;
}

function stop() { if (running) running.abort(); }

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function showSaid(text, role = "user") {
  const name = role === "tool" ? "Tool" : "You";
  byId("log").append(el("article", { class: `message ${role}`, "aria-label": name }, el("div", { class: "text" }, text)));
}

function shown(withTokens, messages) {
  const answer = new Answer(withTokens, () => asCurl(bodyOf(messages), Boolean(key())));
  byId("log").append(answer.node);
  return answer;
}

async function send() {
  const prompt = byId("prompt");
  const text = prompt.value.trim();
  if (!text || running) return;
  if (!byId("parameters").reportValidity()) return;
  byId("log").querySelector(".welcome")?.remove();
  byId("log").querySelector(".results")?.remove();
  conversation.push({ role: "user", content: text });
  showSaid(text);
  prompt.value = "";
  grow(prompt);
  if (!await ask()) conversation.pop();
}

// Asks for the next message; whether there is one.
async function ask() {
  const body = bodyOf(conversation);
  const answer = shown(field("logprobs").checked, [...conversation]);
  const mine = conversation;
  answer.follow(true);
  running = new AbortController();
  busy(true);
  try {
    const streamed = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
    const response = await request("/v1/chat/completions", { method: "POST", body: streamed, signal: running.signal });
    for await (const event of events(response)) answer.take(event);
    answer.end(null);
  } catch (error) {
    const stopped = running.signal.aborted;
    answer.end(stopped ? null : error.message, stopped ? "stopped" : "error");
    if (!stopped) report(error);
  }
  running = null;
  busy(false);
  const message = answer.message();
  if (message && mine === conversation) {
    conversation.push(message);
    saved.keep(conversation);
    if (message.tool_calls) askResults(message.tool_calls);
  }
  if (byId("chat").hidden === false && !message?.tool_calls) byId("prompt").focus({ preventScroll: true });
  return message !== null;
}

// A form for what the tools gave back; the page runs none of them.
function askResults(calls) {
  const inputs = calls.map((call) => el("textarea", { rows: "2", required: true, "aria-label": `Result of ${call.function.name}`,
    placeholder: `What ${call.function.name} gave back` }));
  const form = el("form", { class: "results" }, ...inputs, el("button", { class: "primary" }, "Send results"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.remove();
    calls.forEach((call, i) => {
      conversation.push({ role: "tool", tool_call_id: call.id, content: inputs[i].value });
      showSaid(inputs[i].value, "tool");
    });
    ask();
  });
  byId("log").append(form);
  form.scrollIntoView({ block: "nearest" });
  inputs[0].focus();
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("log").setAttribute("aria-busy", String(is));
}
