// Every KV block as a small square: its colour is the sequence that holds it, a ring means that several share it.

import { el } from "./dom.js";

const MOST_CELL = 16;
const LEAST_CELL = 3;
const GOLDEN = 137.508;  // degrees: neighbours in arrival order get colours far apart
const hues = new Map();

function hueOf(id) {
  if (!hues.has(id)) {
    if (hues.size > 4096) hues.clear();
    hues.set(id, (165 + hues.size * GOLDEN) % 360);
  }
  return hues.get(id);
}

export const colourOf = (id) => `hsl(${hueOf(id).toFixed(0)} 62% 50%)`;

export class BlockMap {
  constructor() {
    this.canvas = el("canvas", { role: "img", "aria-label": "KV block map", tabindex: "0" });
    this.label = el("p", { class: "note label", "aria-live": "polite" }, "Point at a block, or move with the arrow keys, to see who holds it.");
    this.node = el("div", { class: "map" }, this.canvas, this.label);
    this.owners = new Map();
    this.cached = new Set();
    this.shared = 0;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.step(event));
    this.canvas.addEventListener("blur", () => { this.at = null; this.draw(); });
    this.at = null;  // the block that the keyboard is at
    new ResizeObserver(() => this.draw()).observe(this.node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(state) {
    this.state = state;
    this.owners = new Map();
    for (const sequence of state.sequences) {
      for (const block of sequence.blocks) {
        const owners = this.owners.get(block);
        if (owners) owners.push(sequence.id);
        else this.owners.set(block, [sequence.id]);
      }
    }
    this.cached = new Set(state.cached_blocks);
    this.shared = [...this.owners.values()].filter((owners) => owners.length > 1).length;
    this.draw();
  }

  layout() {
    const count = this.state.num_blocks;
    const width = Math.max(120, this.node.clientWidth);
    let cell = MOST_CELL;
    while (cell > LEAST_CELL && Math.ceil(count / Math.floor(width / cell)) * cell > 190) cell -= 1;
    const columns = Math.min(count, Math.floor(width / cell));
    return { count, cell, columns, height: Math.ceil(count / columns) * cell };
  }

  draw() {
    if (!this.state || !this.node.clientWidth) return;
    const { count, cell, columns, height } = (this.grid = this.layout());
    const scale = devicePixelRatio || 1;
    const width = columns * cell;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const draw = this.canvas.getContext("2d");
    const style = getComputedStyle(this.node);
    const [empty, cached, ring] = ["--empty", "--cached", "--text"].map((name) => style.getPropertyValue(name));
    const gap = cell > 5 ? 2 : 1;
    draw.scale(scale, scale);
    for (let block = 0; block < count; block += 1) {
      const x = (block % columns) * cell;
      const y = Math.floor(block / columns) * cell;
      const owners = this.owners.get(block);
      draw.fillStyle = owners ? colourOf(owners[0]) : this.cached.has(block) ? cached : empty;
      draw.fillRect(x, y, cell - gap, cell - gap);
      if (owners && owners.length > 1) {
        draw.strokeStyle = ring;
        draw.lineWidth = cell > 8 ? 2 : 1;
        draw.strokeRect(x + 1, y + 1, cell - gap - 2, cell - gap - 2);
      }
    }
    if (this.at !== null && this.at < count) {
      draw.strokeStyle = style.getPropertyValue("--accent");
      draw.lineWidth = 2;
      draw.strokeRect((this.at % columns) * cell, Math.floor(this.at / columns) * cell, cell - gap, cell - gap);
      this.describe(this.at);
    }
    this.canvas.setAttribute("aria-label", `KV block map: ${this.owners.size} of ${count} blocks in use`);
  }

  point(event) {
    if (!this.grid) return;
    const { cell, columns, count } = this.grid;
    const block = Math.floor(event.offsetY / cell) * columns + Math.floor(event.offsetX / cell);
    if (block >= 0 && block < count) this.describe(block);
  }

  step(event) {
    if (!this.grid) return;
    const { columns, count } = this.grid;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -count, End: count };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.at = this.at === null ? 0 : Math.max(0, Math.min(count - 1, this.at + moves[event.key]));
    this.draw();
  }

  describe(block) {
    const owners = this.owners.get(block);
    const what = owners ? `held by ${owners.join(", ")}` : this.cached.has(block) ? "free, holds a reusable prefix" : "empty";
    const text = `Block ${block}: ${what}`;
    if (this.label.textContent !== text) this.label.textContent = text;
  }
}
