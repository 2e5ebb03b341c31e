// An answer as it comes: text, thoughts, tool calls, tokens with their probabilities, and how fast it was.

import { byId, el, rate, seconds, setText, whole } from "./dom.js";
import { copyButton, Prose } from "./markdown.js";
import { TokenView } from "./tokens.js";

const LONG = 8000;  // characters from which an answer is drawn less often while it grows

export class Answer {
  constructor(withTokens, curl) {
    this.text = "";
    this.thought = "";  // what a thinking model says before its answer; it is not sent back
    this.calls = [];  // {id, name, arguments}
    this.thinking = el("details", { class: "thinking", open: true, hidden: true }, el("summary", {}, "Thinking"), el("div"));
    this.began = performance.now();
    this.first = this.last = 0;
    this.tokens = 0;
    this.reason = "";
    this.drawAt = 0;
    this.prose = new Prose(el("span", { class: "caret", "aria-label": "waiting for the first token" }));
    this.content = this.prose.node;
    this.callList = el("div", { class: "calls" });
    this.figures = el("span", { class: "figures" });
    this.view = withTokens ? new TokenView() : null;
    this.switch = this.view && el("button", { type: "button", class: "quiet", "aria-pressed": "true",
      onclick: () => this.toggle() }, "text");
    const foot = el("footer", {}, this.figures, this.switch, copyButton(() => this.text), copyButton(curl, "copy as curl"));
    this.node = el("article", { class: "message assistant", "aria-label": "Model" }, this.thinking, this.content,
      this.view && this.view.node, this.callList, foot);
    if (this.view) this.content.hidden = true;
    this.content.addEventListener("rendered", () => this.follow(this.follows));
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
      const calls = choice.delta.tool_calls || [];
      if (added || thought || choice.logprobs || calls.length) {
        if (!this.first) this.first = now;
        this.last = now;
        this.text += added;
        this.thought += thought;
        if (!event.usage) this.tokens += choice.logprobs ? choice.logprobs.content.length : 1;
      }
      for (const call of calls) this.takeCall(call);
      if (choice.logprobs && this.view) this.view.add(choice.logprobs.content);
      if (choice.finish_reason) this.reason = choice.finish_reason;
    }
    if (!this.drawAt) this.drawAt = setTimeout(() => this.draw(), this.text.length > LONG ? 250 : 33);
  }

  takeCall({ index, id, function: told }) {
    const call = (this.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id || "";
    call.name ||= (told && told.name) || "";
    call.arguments += (told && told.arguments) || "";
  }

  draw(ended = false) {
    this.drawAt = 0;
    this.follows = this.atEnd();
    if (this.thought) {
      this.thinking.hidden = false;
      setText(this.thinking.lastChild, this.thought.trim());
      if (this.text && !this.answered) { this.answered = true; this.thinking.open = false; }
    }
    if (this.text) this.prose.show(this.text, ended);
    if (this.calls.length) {
      if (!this.text) this.prose.tail.replaceChildren();
      this.callList.replaceChildren(...this.calls.map((call) => el("pre", {}, el("code", {}, `${call.name}(${call.arguments})`))));
    }
    this.showFigures();
    this.follow(this.follows);
  }

  showFigures() {
    if (!this.first) return;
    const after = (this.last - this.first) / 1000;
    const parts = [`first token ${seconds((this.first - this.began) / 1000)}`];
    if (this.tokens > 1 && after > 0) parts.push(`${rate((this.tokens - 1) / after)} tokens/s`);
    parts.push(`${whole(this.tokens)} token${this.tokens === 1 ? "" : "s"}`);
    const said = { stop: "ended by itself", length: "cut at the limit", tool_calls: "calls a tool" };
    if (this.reason) parts.push(said[this.reason] || this.reason);
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
    this.draw(true);
    if (!this.text && !this.calls.length) this.content.replaceChildren(el("em", {}, error ? "" : "no text"));
    if (error) this.node.append(el("p", { class: "error", role: "alert" }, error));
    this.node.classList.add("done");
    this.follow(this.atEnd());
  }

  // What the conversation keeps of it; null for nothing.
  message() {
    if (!this.text && !this.calls.length) return null;
    const made = { role: "assistant", content: this.text || null };
    if (this.calls.length) {
      made.tool_calls = this.calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
    }
    return made;
  }
}
