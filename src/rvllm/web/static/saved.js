// Conversations that are kept in this browser, newest first, and their list beside the settings.

import { byId, el } from "./dom.js";

const KEPT = "rvllm-conversations";
const MAX_KEPT = 50;
const MAX_TITLE = 60;

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT));
    return Array.isArray(kept) ? kept : [];
  } catch { return []; }
}

// Browsers keep some megabytes; the oldest make room.
function store(list) {
  for (let count = Math.min(list.length, MAX_KEPT); count >= 0; count -= 1) {
    try { localStorage.setItem(KEPT, JSON.stringify(list.slice(0, count))); return; } catch { /* too much, or off */ }
  }
}

export class Saved {
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.id = null;  // of the conversation that is shown
    addEventListener("storage", (event) => { if (event.key === KEPT) this.draw(); });
    this.draw();
  }

  keep(messages) {
    const list = load().filter((one) => one.id !== this.id);
    this.id ??= `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`;
    const asked = messages.find((message) => message.role === "user");
    const title = (asked ? asked.content : "").replace(/\s+/g, " ").slice(0, MAX_TITLE);
    store([{ id: this.id, title, messages }, ...list]);
    this.draw();
  }

  forget(id) {
    store(load().filter((one) => one.id !== id));
    if (this.id === id) this.id = null;
    this.draw();
  }

  draw() {
    const list = load();
    byId("saved").hidden = list.length === 0;
    byId("saved-list").replaceChildren(...list.map((one) => el("li", { "aria-current": one.id === this.id ? "true" : null },
      el("button", { type: "button", class: "open", title: one.title, onclick: () => { this.id = one.id; this.onOpen(one.messages); this.draw(); } }, one.title || "(empty)"),
      el("button", { type: "button", class: "quiet", "aria-label": `Delete ${one.title}`, onclick: () => this.forget(one.id) }, "delete"))));
  }
}
