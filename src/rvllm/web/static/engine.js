// The engine, live: figures, tokens per second against the limit, requests, KV blocks, memory, kernels.

import { BlockMap, colourOf } from "./blockmap.js";
import { Chart } from "./chart.js";
import { bytes, el, percent, rate, seconds, setText, whole } from "./dom.js";

const WINDOW = 2.5;  // seconds over which rates are taken

export class EngineView {
  constructor(node) {
    this.node = node;
    this.history = [];  // {time, generated, prompt, idle, loop}
    this.chart = new Chart();
    this.map = new BlockMap();
    this.tiles = new Map();
    this.started = false;
  }

  build() {
    const tile = (name, help) => {
      const value = el("dd", {}, "–");
      const detail = el("span", {}, "");
      this.tiles.set(name, { value, detail });
      return el("div", { class: "tile", title: help }, el("dt", {}, name), value, detail);
    };
    this.requests = el("tbody");
    this.requestNote = el("p", { class: "note" });
    this.ledger = el("div", { class: "ledger", role: "img" });
    this.legend = el("ul", { class: "legend" });
    this.matrices = el("tbody");
    this.matrixNote = el("p", { class: "note" });
    this.kernels = el("tbody");
    this.about = el("dl", { class: "about" });
    this.blockNote = el("p", { class: "note" });
    this.node.replaceChildren(
      el("dl", { class: "tiles" },
        tile("Generated", "Tokens drawn per second, all requests together"),
        tile("Of the limit", "Against what the memory's speed allows for a decode step of this batch"),
        tile("Prompts", "Prompt tokens computed per second"),
        tile("Running", "Requests in the batch"), tile("Waiting", "Requests in the queue"),
        tile("KV blocks", "Blocks held by sequences"),
        tile("Prefix hits", "Share of prompt tokens found in the cache"),
        tile("Idle", "Share of the time the engine waited for a request")),
      card("Tokens per second", "wide", this.chart.node),
      card("Requests", "wide", el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Requests" },
        el("table", {}, el("thead", {}, headings("Request", "", "Prompt", "Cached", "Output", "Blocks", "Queued", "Age")), this.requests)), this.requestNote),
      card("KV blocks", "wide", this.map.node, this.blockNote),
      card("Memory", "", this.ledger, this.legend),
      card("Matrices", "", el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Matrices" },
        el("table", {}, el("thead", {}, headings("Matrix", "Strategy", "Kernel", "Why")), this.matrices)), this.matrixNote),
      card("Kernels of the last step", "tall", el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Kernels" },
        el("table", {}, el("thead", {}, headings("Op", "Kernel", "Launches", "Why")), this.kernels))),
      card("Engine", "", this.about));
    this.started = true;
  }

  show(state) {
    if (!this.started) this.build();
    const now = this.remember(state);
    this.showTiles(state, now);
    this.chart.add(state.time, now.generated, now.floor);
    this.showRequests(state);
    this.map.show(state);
    setText(this.blockNote, this.describeBlocks(state));
    this.showMemory(state);
    this.showKernels(state);
    this.showAbout(state);
  }

  pause() { this.history.length = 0; }

  remember(state) {
    const { stats } = state;
    const last = this.history[this.history.length - 1];
    if (last && (last.stats.steps > stats.steps || state.time <= last.time)) this.history.length = 0;  // a new engine
    this.history.push({ time: state.time, stats });
    while (this.history.length > 2 && state.time - this.history[1].time >= WINDOW) this.history.shift();
    const first = this.history[0];
    const span = state.time - first.time;
    const per = (name) => (span > 0 ? (stats[name] - first.stats[name]) / span : 0);
    const loop = stats.loop_seconds - first.stats.loop_seconds;
    const floor = state.floor_seconds ? stats.running / state.floor_seconds : null;
    return { generated: per("generation_tokens"), prompt: per("prompt_tokens"), steps: per("steps"), floor,
      idle: loop > 0 ? (stats.idle_seconds - first.stats.idle_seconds) / loop : null };
  }

  tile(name, value, detail = "") {
    const tile = this.tiles.get(name);
    setText(tile.value, value);
    setText(tile.detail, detail);
  }

  showTiles(state, now) {
    const { stats } = state;
    this.tile("Generated", rate(now.generated), "tokens/s");
    this.tile("Of the limit", now.floor && now.generated ? percent(now.generated / now.floor) : "–",
      now.floor ? `${rate(now.floor)} tokens/s` : stats.running ? "not known here" : "nothing runs");
    this.tile("Prompts", rate(now.prompt), "tokens/s");
    this.tile("Running", whole(stats.running), `of ${whole(state.max_num_seqs)}`);
    this.tile("Waiting", whole(stats.waiting), stats.preemptions ? `${whole(stats.preemptions)} preempted` : "");
    this.tile("KV blocks", percent(stats.blocks_total ? stats.blocks_used / stats.blocks_total : 0),
      `${whole(stats.blocks_used)} of ${whole(stats.blocks_total)}`);
    this.tile("Prefix hits", stats.prefix_queries ? percent(stats.cached_prompt_tokens / stats.prefix_queries) : "–",
      `${whole(stats.cached_prompt_tokens)} tokens${stats.cpu_blocks_total ? `, ${whole(stats.host_hits)} of them from host memory` : ""}`);
    const device = stats.backend["rvllm:decode_idle_share"];
    this.tile("Idle", now.idle === null ? "–" : percent(now.idle),
      device === undefined ? `${rate(now.steps)} steps/s` : `${percent(device)} between steps`);
  }

  showRequests(state) {
    rows(this.requests, state.sequences, (sequence) => {
      const share = Math.min(1, sequence.computed / (sequence.prompt_tokens + sequence.output_tokens || 1));
      const doing = !sequence.running ? "waiting" : sequence.output_tokens ? "decoding" : `prefill ${percent(share)}`;
      const mark = el("span", { class: "swatch" });
      if (sequence.running) mark.style.background = colourOf(sequence.id);
      const name = el("td", {}, mark, el("code", { title: sequence.id }, shortId(sequence.id)));
      return [name, doing, whole(sequence.prompt_tokens), whole(sequence.cached_tokens), outputCell(sequence),
        sequence.running ? whole(Math.ceil(sequence.computed / state.block_size)) : "–", seconds(sequence.queued), seconds(sequence.age)];
    });
    const listed = state.sequences.length;
    const alive = state.stats.running + state.stats.waiting;
    setText(this.requestNote, alive > listed ? `The first ${listed} of ${whole(alive)}.` : alive ? "" : "No request is alive. Start one in the chat, or with any OpenAI client.");
  }

  describeBlocks(state) {
    const { stats } = state;
    const free = stats.blocks_total - stats.blocks_used - stats.blocks_cached;
    const shared = this.map.shared;
    return `${whole(stats.blocks_used)} in use, ${whole(shared)} of them shared by several sequences; ${whole(stats.blocks_cached)} free with a `
      + `reusable prefix, ${whole(free)} empty; ${state.block_size} tokens each.${stats.cpu_blocks_total ? ` In host memory ${whole(stats.cpu_blocks_used)} of ${whole(stats.cpu_blocks_total)} hold a prefix.` : ""}${state.cut ? " Not all sequences and blocks are drawn." : ""}`;
  }

  showMemory(state) {
    const lines = state.ledger.filter((line) => line.bytes > 0);
    const total = lines.reduce((sum, line) => sum + line.bytes, 0);
    const drawn = JSON.stringify(lines);
    if (this.drawnLedger === drawn) return;
    this.drawnLedger = drawn;
    this.ledger.setAttribute("aria-label", `Memory ledger: ${lines.map((line) => `${line.name} ${bytes(line.bytes)}`).join(", ")}`);
    this.ledger.replaceChildren(...lines.map((line, i) => {
      const part = el("span", { title: `${line.name}: ${bytes(line.bytes)}`, "data-part": line.name === "free" ? "free" : i % 8 });
      part.style.flexGrow = line.bytes;
      return part;
    }));
    this.legend.replaceChildren(...lines.map((line, i) => el("li", {},
      el("span", { class: "swatch", "data-part": line.name === "free" ? "free" : i % 8 }), line.name,
      el("b", {}, bytes(line.bytes)), el("i", {}, percent(line.bytes / total)))),
    el("li", { class: "sum" }, el("span"), "together", el("b", {}, bytes(total)), el("i")));
  }

  showKernels(state) {
    const path = state.settings["decode path"];
    const asked = path ? `Decode path: ${path}. Strategy asked for: ${state.settings["GEMM strategy"]}. ` : "";
    const ratio = state.floor_ratio === null ? "" : `The last decode steps ran at ${percent(state.floor_ratio)} of the limit.`;
    setText(this.matrixNote, state.kernels.length ? asked + ratio : "No step has run yet.");
    const drawn = JSON.stringify(state.kernels);
    if (this.drawnKernels === drawn) return;
    this.drawnKernels = drawn;
    const code = (text) => el("td", {}, el("code", {}, text));
    const matrices = state.kernels.filter((kernel) => kernel.strategy);
    rows(this.matrices, matrices, (kernel) => [code(kernel.op), kernel.strategy, code(kernel.kernel), kernel.why || "–"]);
    rows(this.kernels, state.kernels, (kernel) => [code(kernel.op), code(kernel.kernel), whole(kernel.count), kernel.why || "–"]);
  }

  showAbout(state) {
    const facts = { model: state.model, architecture: state.architecture, device: state.backend, dtype: state.dtype, ...state.settings,
      context: `${whole(state.max_model_len)} tokens`, "step budget": `${whole(state.max_num_batched_tokens)} tokens`,
      "steps in flight": state.pipeline_depth, loaded: `in ${seconds(state.load_seconds)}`, up: seconds(state.uptime), version: state.version };
    const drawn = JSON.stringify(facts);
    if (this.drawnAbout === drawn) return;
    this.drawnAbout = drawn;
    this.about.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
  }
}

function card(title, kind, ...children) {
  return el("section", { class: `card ${kind}` }, el("h2", {}, title), ...children);
}

const headings = (...names) => el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)));

// Eight characters tell requests apart; the number of a choice stays. The whole id is in the title.
const shortId = (id) => id.replace(/^[a-z]+[-_](?=[0-9a-f]{16})/, "").replace(/^([0-9a-f]{8})[0-9a-f]{8,}/, "$1");

function outputCell(sequence) {
  const meter = el("span", { class: "meter" });
  meter.style.setProperty("--share", Math.min(1, sequence.output_tokens / Math.max(1, sequence.max_tokens)));
  return el("td", {}, meter, `${whole(sequence.output_tokens)} of ${whole(sequence.max_tokens)}`);
}

function rows(body, items, cells) {
  body.replaceChildren(...items.map((item) => el("tr", {}, ...cells(item).map((cell) => (cell instanceof Node ? cell : el("td", {}, String(cell)))))));
}
