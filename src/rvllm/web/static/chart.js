// Tokens per second over the last two minutes, as SVG, with the limit as a dashed line.

import { el, rate } from "./dom.js";

const SPAN = 120;
const WIDTH = 800;
const HEIGHT = 160;

const svg = (tag, attributes = {}) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
};

export class Chart {
  constructor() {
    this.points = [];
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.floor = svg("path", { class: "floor" });
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const part of [0.25, 0.5, 0.75]) {
      this.picture.append(svg("path", { class: "grid", d: `M0 ${HEIGHT * part}H${WIDTH}` }));
    }
    this.picture.append(this.area, this.floor, this.line);
    this.top = el("span", { class: "top" });
    this.floorLabel = el("span", { class: "floor-label", hidden: true }, "limit");
    this.node = el("div", { class: "chart", role: "img" }, this.picture, this.top, this.floorLabel,
      el("span", { class: "left" }, "2 min ago"), el("span", { class: "right" }, "now"));
  }

  add(time, value, floor) {
    this.points.push({ time, value, floor });
    while (this.points[0].time < time - SPAN) this.points.shift();
    const most = niceTop(Math.max(10, ...this.points.map((point) => Math.max(point.value, point.floor || 0))));
    const x = (point) => (WIDTH * (1 - (time - point.time) / SPAN)).toFixed(1);
    const y = (amount) => (HEIGHT - (HEIGHT - 4) * amount / most).toFixed(1);
    const path = this.points.map((point, i) => `${i ? "L" : "M"}${x(point)} ${y(point.value)}`).join("");
    this.line.setAttribute("d", path);
    this.area.setAttribute("d", `${path}V${HEIGHT}H${x(this.points[0])}Z`);
    let dashed = "";
    let open = false;
    for (const point of this.points) {
      if (point.floor) dashed += `${open ? "L" : "M"}${x(point)} ${y(point.floor)}`;
      open = Boolean(point.floor);
    }
    this.floor.setAttribute("d", dashed);
    this.floorLabel.hidden = !floor;
    if (floor) this.floorLabel.style.top = `${(100 * (1 - floor / most)).toFixed(1)}%`;
    this.top.textContent = `${rate(most)} tokens/s`;
    this.node.setAttribute("aria-label", `${rate(value)} tokens per second now${floor ? `, the limit is ${rate(floor)}` : ""}`);
  }
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((step) => step * power).find((step) => step >= value);
}
