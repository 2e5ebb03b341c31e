// The playground: a conversation over /v1/chat/completions.

import { events, request } from "./api.js";
import { byId, el, rate, seconds, setText, whole } from "./dom.js";
import { copyButton, markdown } from "./markdown.js";
import { TokenView } from "./tokens.js";

const SETTINGS = "rvllm-settings";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const LONG = 8000;  // characters from which an answer is drawn less often while it grows

const conversation = [];
let running = null;  // AbortController of the answer in progress
let report = () => {};

export function startChat(onError) {
  report = onError;
  const prompt = byId("prompt");
  restoreSettings();
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("parameters").addEventListener("input", keepSettings);
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
  conversation.length = 0;
  showWelcome();
  byId("prompt").focus();
}

function stop() { if (running) running.abort(); }

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function field(name) { return byId("parameters").elements[name]; }

function keepSettings() {
  const kept = {};
  for (const name of ["system", "stop", ...NUMBERS]) kept[name] = field(name).value;
  kept.logprobs = field("logprobs").checked;
  try { localStorage.setItem(SETTINGS, JSON.stringify(kept)); } catch { /* storage is off */ }
}

function restoreSettings() {
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(SETTINGS)) || {}; } catch { /* none */ }
  for (const name of ["system", "stop", ...NUMBERS]) if (kept[name]) field(name).value = kept[name];
  field("logprobs").checked = Boolean(kept.logprobs);
}

function body() {
  const system = field("system").value.trim();
  const asked = { messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation], stream: true,
    stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (field(name).value !== "") asked[name] = Number(field(name).value);
  if (field("stop").value) asked.stop = [field("stop").value];
  if (field("logprobs").checked) { asked.logprobs = true; asked.top_logprobs = 5; }
  return JSON.stringify(asked);
}

async function send() {
  const prompt = byId("prompt");
  const text = prompt.value.trim();
  if (!text || running) return;
  if (!byId("parameters").reportValidity()) return;
  byId("log").querySelector(".welcome")?.remove();
  conversation.push({ role: "user", content: text });
  byId("log").append(el("article", { class: "message user", "aria-label": "You" }, el("div", { class: "text" }, text)));
  prompt.value = "";
  grow(prompt);
  const answer = new Answer(field("logprobs").checked);
  byId("log").append(answer.node);
  answer.follow(true);
  running = new AbortController();
  busy(true);
  try {
    const response = await request("/v1/chat/completions", { method: "POST", body: body(), signal: running.signal });
    for await (const event of events(response)) answer.take(event);
    answer.end(null);
  } catch (error) {
    const stopped = running.signal.aborted;
    answer.end(stopped ? null : error.message, stopped ? "stopped" : "error");
    if (!stopped) report(error);
  }
  running = null;
  busy(false);
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  else conversation.pop();
  if (byId("chat").hidden === false) prompt.focus({ preventScroll: true });
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("log").setAttribute("aria-busy", String(is));
}

class Answer {
  constructor(withTokens) {
    this.text = "";
    this.thought = "";  // what a thinking model says before its answer; it is not sent back
    this.thinking = el("details", { class: "thinking", open: true, hidden: true }, el("summary", {}, "Thinking"), el("div"));
    this.began = performance.now();
    this.first = this.last = 0;
    this.tokens = 0;
    this.reason = "";
    this.drawAt = 0;
    this.content = el("div", { class: "text" }, el("span", { class: "caret", "aria-label": "waiting for the first token" }));
    this.figures = el("span", { class: "figures" });
    this.view = withTokens ? new TokenView() : null;
    this.switch = this.view && el("button", { type: "button", class: "quiet", "aria-pressed": "true",
      onclick: () => this.toggle() }, "text");
    const foot = el("footer", {}, this.figures, this.switch, copyButton(() => this.text));
    this.node = el("article", { class: "message assistant", "aria-label": "Model" }, this.thinking, this.content, this.view && this.view.node, foot);
    if (this.view) this.content.hidden = true;
  }

  toggle() {
    this.content.hidden = !this.content.hidden;
    this.view.node.hidden = !this.content.hidden;
    this.switch.textContent = this.content.hidden ? "text" : "tokens";
  }

  take(event) {
    const now = performance.now();
    if (event.usage) this.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      const added = choice.delta.content || "";
      const thought = choice.delta.reasoning_content || choice.delta.reasoning || "";
      if (added || thought || choice.logprobs) {
        if (!this.first) this.first = now;
        this.last = now;
        this.text += added;
        this.thought += thought;
        if (!event.usage) this.tokens += choice.logprobs ? choice.logprobs.content.length : 1;
      }
      if (choice.logprobs && this.view) this.view.add(choice.logprobs.content);
      if (choice.finish_reason) this.reason = choice.finish_reason;
    }
    if (!this.drawAt) this.drawAt = setTimeout(() => this.draw(), this.text.length > LONG ? 250 : 33);
  }

  draw() {
    this.drawAt = 0;
    const follow = this.atEnd();
    if (this.thought) {
      this.thinking.hidden = false;
      setText(this.thinking.lastChild, this.thought.trim());
      if (this.text && !this.answered) { this.answered = true; this.thinking.open = false; }
    }
    if (this.text) this.content.replaceChildren(markdown(this.text));
    this.showFigures();
    this.follow(follow);
  }

  showFigures() {
    if (!this.first) return;
    const after = (this.last - this.first) / 1000;
    const parts = [`first token ${seconds((this.first - this.began) / 1000)}`];
    if (this.tokens > 1 && after > 0) parts.push(`${rate((this.tokens - 1) / after)} tokens/s`);
    parts.push(`${whole(this.tokens)} token${this.tokens === 1 ? "" : "s"}`);
    if (this.reason) parts.push({ stop: "ended by itself", length: "cut at the limit" }[this.reason] || this.reason);
    setText(this.figures, parts.join(" · "));
  }

  atEnd() {
    const log = byId("log");
    return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  }

  follow(wanted) { if (wanted) byId("log").scrollTop = byId("log").scrollHeight; }

  end(error, reason) {
    clearTimeout(this.drawAt);
    if (reason) this.reason = reason;
    this.draw();
    if (!this.text) this.content.replaceChildren(el("em", {}, error ? "" : "no text"));
    if (error) this.node.append(el("p", { class: "error", role: "alert" }, error));
    this.node.classList.add("done");
    this.follow(this.atEnd());
  }
}
