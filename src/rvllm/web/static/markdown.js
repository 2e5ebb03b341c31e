// An answer's Markdown: finished blocks are rendered by the server (and sanitised there), the block that still
// grows is shown here as plain text, with code in a frame of its own.

import { request } from "./api.js";
import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const GOES_ON = /^(?: |\t|[-*+] |\d{1,9}[.)] |>)/;  // a line that may belong to the list or quotation before it

export class Prose {
  constructor(waiting = "") {
    this.tail = el("div", { class: "tail" }, waiting);
    this.node = el("div", { class: "text" }, this.tail);
    this.text = "";
    this.done = 0;  // characters that the server has rendered
    this.ended = false;
    this.asking = false;
  }

  show(text, ended = false) {
    this.text = text;
    this.ended = ended;
    this.drawTail();
    if (!this.asking) this.finish();
  }

  drawTail() { this.tail.replaceChildren(plain(this.text.slice(this.done))); }

  // Blocks are asked for one request after the other, so that they cannot come out of order.
  async finish() {
    this.asking = true;
    for (;;) {
      const end = this.ended ? this.text.length : finishedUpTo(this.text, this.done);
      if (end <= this.done) break;
      const part = this.text.slice(this.done, end);
      const made = part.trim() ? await rendered(part) : document.createDocumentFragment();
      this.tail.before(made);
      this.done = end;
      this.drawTail();
    }
    this.asking = false;
    this.node.dispatchEvent(new CustomEvent("rendered", { bubbles: true }));
  }
}

// Where the last block ends that cannot change any more: behind an empty line that is not within code or a
// formula, when what follows it is no part of a list or quotation.
export function finishedUpTo(text, from) {
  let fence = "";
  let formula = false;
  let end = from;
  let at = from;
  const lines = text.slice(from).split("\n");
  lines.pop();  // it may still grow
  lines.forEach((line, i) => {
    at += line.length + 1;
    const mark = FENCE.exec(line);
    if (fence) {
      if (closes(line, fence)) fence = "";
    } else if (mark) [, fence] = mark;
    else if (/^\s*(\$\$|\\\[|\\\])\s*$/.test(line)) formula = !formula;
    else if (!line.trim() && !formula && i + 1 < lines.length && lines[i + 1].trim() && !GOES_ON.test(lines[i + 1])) end = at;
  });
  return end;
}

function closes(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && [...trimmed].every((mark) => mark === fence[0]);
}

async function rendered(text) {
  const template = document.createElement("template");
  try {
    const response = await request("/rvllm/markdown", { method: "POST", body: JSON.stringify({ text }) });
    template.innerHTML = (await response.json()).html;  // safe: sanitised, and the page runs no inline scripts
  } catch {
    return plain(text);  // the server is gone or refuses: what the model wrote is still there to read
  }
  for (const pre of template.content.querySelectorAll("pre")) frame(pre);
  for (const table of template.content.querySelectorAll("table")) {
    const scroll = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(scroll);
    scroll.append(table);
  }
  return template.content;
}

function frame(pre) {
  const bar = el("div", { class: "code-bar" }, el("span", {}, pre.dataset.language || "text"), copyButton(() => pre.textContent));
  const block = el("div", { class: "code" }, bar);
  pre.replaceWith(block);
  pre.tabIndex = 0;
  block.append(pre);
}

// Text as it is, and code that has begun.
export function plain(text) {
  const made = document.createDocumentFragment();
  let fence = "";
  let lines = [];
  let language = "";
  const flush = () => {
    const inside = lines.join("\n");
    lines = [];
    if (fence) {
      const pre = el("pre", {}, el("code", {}, inside));
      if (language) pre.dataset.language = language;
      made.append(pre);
      frame(pre);
    } else if (inside.trim()) made.append(el("p", { class: "raw" }, inside.trim()));
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line);
    if (fence ? closes(line, fence) : mark) {
      flush();
      [fence, language] = fence ? ["", ""] : [mark[1], mark[2]];
    } else lines.push(line);
  }
  flush();
  return made;
}

export function copyButton(text, name = "copy") {
  return el("button", { type: "button", class: "quiet", onclick: async (event) => {
    const button = event.currentTarget;
    try { await navigator.clipboard.writeText(text()); button.textContent = "copied"; }
    catch { button.textContent = "not allowed"; }
    setTimeout(() => { button.textContent = name; }, 1500);
  } }, name);
}
