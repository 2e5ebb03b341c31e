// A small Markdown renderer that makes DOM nodes. What a model writes is only ever text content and, for links
// with a harmless scheme, an href; images are shown as links and nothing is loaded.

import { el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const DIVIDER = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;
const DEEPEST = 8;

export function markdown(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

function blocks(lines, parent, depth) {
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if (!line.trim()) i += 1;
    else if ((match = FENCE.exec(line))) i = code(lines, i, match, parent);
    else if ((match = HEADING.exec(line))) {
      parent.append(inlineInto(el(`h${Math.min(6, match[1].length + 1)}`), match[2]));
      i += 1;
    } else if (RULE.test(line)) { parent.append(el("hr")); i += 1; }
    else if (/^ {0,3}>/.test(line) && depth < DEEPEST) i = quote(lines, i, parent, depth);
    else if (ITEM.test(line) && depth < DEEPEST) i = list(lines, i, parent, depth);
    else if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && DIVIDER.test(lines[i + 1])) {
      i = table(lines, i, parent);
    } else i = paragraph(lines, i, parent);
  }
}

function code(lines, start, match, parent) {
  const fence = match[1];
  const inside = [];
  let i = start + 1;
  while (i < lines.length && !isClosing(lines[i], fence)) { inside.push(lines[i]); i += 1; }
  const block = el("code", {}, inside.join("\n"));
  const bar = el("div", { class: "code-bar" }, el("span", {}, match[2] || "text"), copyButton(() => inside.join("\n")));
  parent.append(el("div", { class: "code" }, bar, el("pre", { tabindex: "0" }, block)));
  return i + 1;
}

function isClosing(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && [...trimmed].every((mark) => mark === fence[0]);
}

export function copyButton(text) {
  return el("button", { type: "button", class: "quiet", onclick: async (event) => {
    const button = event.currentTarget;
    try { await navigator.clipboard.writeText(text()); button.textContent = "copied"; }
    catch { button.textContent = "not allowed"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  } }, "copy");
}

function quote(lines, start, parent, depth) {
  const inside = [];
  let i = start;
  while (i < lines.length && /^ {0,3}>/.test(lines[i])) { inside.push(lines[i].replace(/^ {0,3}> ?/, "")); i += 1; }
  const node = el("blockquote");
  blocks(inside, node, depth + 1);
  parent.append(node);
  return i;
}

function list(lines, start, parent, depth) {
  const first = ITEM.exec(lines[start]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const node = ordered ? el("ol", { start: parseInt(first[2], 10) }) : el("ul");
  let i = start;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || match[1].length !== indent || /\d/.test(match[2]) !== ordered) break;
    const inside = [match[3]];
    const content = indent + match[2].length + 1;
    i += 1;
    while (i < lines.length && (belongs(lines[i], indent) || (!lines[i].trim() && belongs(lines[i + 1], indent)))) {
      inside.push(lines[i].slice(Math.min(content, lines[i].search(/\S|$/))));
      i += 1;
    }
    const item = el("li");
    blocks(inside, item, depth + 1);
    if (item.childNodes.length === 1 && item.firstChild.tagName === "P") item.replaceChildren(...item.firstChild.childNodes);
    node.append(item);
    while (i + 1 < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1])) i += 1;
  }
  parent.append(node);
  return i;
}

const belongs = (line, indent) => line !== undefined && line.trim() !== "" && line.search(/\S/) > indent;

function table(lines, start, parent) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => inlineInto(el(tag), cell)));
  const body = el("tbody");
  let i = start + 2;
  while (i < lines.length && lines[i].includes("|")) { body.append(row(lines[i], "td")); i += 1; }
  parent.append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, row(lines[start], "th")), body)));
  return i;
}

function paragraph(lines, start, parent) {
  const inside = [];
  let i = start;
  do { inside.push(lines[i].trim()); i += 1; } while (i < lines.length && lines[i].trim() && !opensBlock(lines[i]));
  parent.append(inlineInto(el("p"), inside.join("\n")));
  return i;
}

const opensBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || /^ {0,3}>/.test(line);

// Inline marks, tried at the leftmost place where one of them could begin.
const STARTS = /[`*_~[!\\\n]|https?:\/\//g;

export function inlineInto(node, text, depth = 0) {
  let at = 0;
  let plain = 0;
  const flush = (end) => { if (end > plain) node.append(text.slice(plain, end)); };
  const starts = new RegExp(STARTS.source, "g");
  for (;;) {
    starts.lastIndex = at;
    const found = starts.exec(text);
    if (!found) break;
    const made = depth < DEEPEST ? mark(text, found.index, depth) : null;
    if (made) { flush(found.index); node.append(made.node); at = plain = made.end; }
    else at = found.index + 1;
  }
  flush(text.length);
  return node;
}

function mark(text, at, depth) {
  const rest = text.slice(at, at + 8);
  if (text[at] === "\n") return { node: el("br"), end: at + 1 };
  if (text[at] === "\\" && /[\\`*_~[\]()#+.!>-]/.test(rest[1] || "")) return { node: document.createTextNode(rest[1]), end: at + 2 };
  if (text[at] === "`") return inlineCode(text, at);
  if (text[at] === "h") return bareLink(text, at);
  if (text[at] === "[" || rest.startsWith("![")) return link(text, at, depth);
  for (const [sign, tag] of [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]]) {
    if (rest.startsWith(sign)) return emphasis(text, at, sign, tag, depth);
  }
  return null;
}

function inlineCode(text, at) {
  let width = 1;
  while (text[at + width] === "`") width += 1;
  const fence = "`".repeat(width);
  const close = text.indexOf(fence, at + width);
  if (close < 0) return null;
  return { node: el("code", {}, text.slice(at + width, close).trim() || " "), end: close + width };
}

function emphasis(text, at, sign, tag, depth) {
  const from = at + sign.length;
  if (/\s|^$/.test(text[from] || "")) return null;
  if (sign[0] === "_" && /\w/.test(text[at - 1] || "")) return null;  // snake_case
  let close = text.indexOf(sign, from + 1);
  if (sign.length === 1) while (close >= 0 && text[close + 1] === sign) close = text.indexOf(sign, close + 2);
  if (close < 0 || /\s/.test(text[close - 1])) return null;
  if (sign[0] === "_" && /\w/.test(text[close + sign.length] || "")) return null;
  return { node: inlineInto(el(tag), text.slice(from, close), depth + 1), end: close + sign.length };
}

const HARMLESS = /^(https?:\/\/|mailto:)/i;

function anchor(href, fill) {
  return fill(el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }));
}

function link(text, at, depth) {
  const open = text[at] === "!" ? at + 1 : at;
  const middle = text.indexOf("](", open);
  const close = middle < 0 ? -1 : text.indexOf(")", middle);
  if (close < 0 || text.slice(open, middle).includes("\n")) return null;
  const label = text.slice(open + 1, middle);
  const href = text.slice(middle + 2, close).trim().split(/\s/)[0];
  if (!HARMLESS.test(href)) return null;
  return { node: anchor(href, (node) => inlineInto(node, label || href, depth + 1)), end: close + 1 };
}

function bareLink(text, at) {
  const found = /^https?:\/\/[^\s<>"'`)\]]+/.exec(text.slice(at, at + 2000));
  const href = found ? found[0].replace(/[.,;:!?*_]+$/, "") : "";
  if (href.length < 10) return null;
  return { node: anchor(href, (node) => { node.append(href); return node; }), end: at + href.length };
}
