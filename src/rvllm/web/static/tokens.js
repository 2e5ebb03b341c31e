// An answer token by token, shaded by how likely each was, with what else could have come on hover or focus.

import { byId, el } from "./dom.js";

const tip = el("div", { id: "token-tip", class: "tip", role: "tooltip", hidden: true });

export class TokenView {
  constructor() {
    this.node = el("div", { class: "tokens", "aria-label": "Tokens with their probabilities; arrow keys move" });
    this.node.addEventListener("pointerover", (event) => this.show(event.target));
    this.node.addEventListener("pointerleave", hide);
    this.node.addEventListener("focusin", (event) => this.show(event.target));
    this.node.addEventListener("focusout", hide);
    this.node.addEventListener("keydown", (event) => this.move(event));
    this.positions = new WeakMap();
    this.count = 0;
  }

  add(positions) {
    for (const position of positions) {
      const token = el("span", { class: "token", tabindex: this.count === 0 ? "0" : "-1" }, position.token);
      token.style.setProperty("--doubt-share", (1 - Math.exp(position.logprob)).toFixed(3));
      this.positions.set(token, position);
      this.node.append(token);
      this.count += 1;
    }
  }

  move(event) {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = step && event.target[step];
    if (!next) { if (event.key === "Escape") hide(); return; }
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  show(token) {
    const position = this.positions.get(token);
    if (!position) return;
    const rows = [position, ...(position.top_logprobs || []).filter((other) => !same(other, position))];
    rows.sort((a, b) => b.logprob - a.logprob);
    tip.replaceChildren(...rows.map((row) => option(row, row === position)));
    if (!tip.isConnected) byId("main").append(tip);
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
    const below = box.bottom + tip.offsetHeight + 8 < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? box.bottom + 4 : box.top - tip.offsetHeight - 4}px`;
  }
}

// Parts of a character all read "�"; their bytes tell them apart.
const same = (a, b) => a.token === b.token && String(a.bytes) === String(b.bytes);

function shown(row) {
  if (!row.token.includes("\ufffd") || !row.bytes) return JSON.stringify(row.token).slice(1, -1);
  return row.bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
}

function option(row, chosen) {
  const share = Math.exp(row.logprob);
  const bar = el("span", { class: "bar" });
  bar.style.setProperty("--share", share.toFixed(4));
  return el("div", { class: chosen ? "option chosen" : "option" },
    el("code", {}, shown(row)), bar, el("span", {}, `${(share * 100).toFixed(share < 0.1 ? 2 : 1)} %`));
}

function hide() { tip.hidden = true; }
