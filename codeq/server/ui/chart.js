/** Lines over time, as SVG. */

import { make, say } from "./elements.js";
import { rate, short } from "./figures.js";

const NS = "http://www.w3.org/2000/svg";
const HEIGHT = 150;
const LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 20;
const SPANS_MS = [60_000, 120_000, 300_000, 600_000];

function svg(tag, attributes = {}, text = "") {
  const one = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  one.textContent = text;
  return one;
}

/** The smallest of 1, 2, 5, 10, ... that is not less. */
function roundUp(value) {
  if (!(value > 0)) return 1;
  const ten = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((digit) => digit * ten).find((bound) => bound >= value * 0.9999);
}

export class Chart {
  #points = [];
  #at = null;

  /** `lines`: [[member of the values, name], ...]; `format` makes a figure a text. */
  constructor(title, lines, format) {
    this.title = title;
    this.lines = lines;
    this.format = format;
    this.figures = lines.map(() => make("b", {}, "–"));
    this.when = make("span", { class: "quiet" });
    const legend = lines.map(([, name], i) =>
      make("li", { class: `s${i + 1}` }, `${name} `, this.figures[i]));
    this.canvas = svg("svg", { role: "img", height: HEIGHT });
    this.element = make("figure", { class: "chart" },
      make("figcaption", {}, make("b", {}, title), " ", this.when),
      make("ul", {}, ...legend), this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => { this.#at = null; this.#draw(); });
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  /** Shows [{atMs, values}], oldest first; no line where values are null. */
  update(points) {
    this.#points = points;
    this.#draw();
  }

  #point(event) {
    const x = event.clientX - this.canvas.getBoundingClientRect().left;
    const distance = (point) => Math.abs(this.#x(point.atMs) - x);
    this.#at = this.#points.reduce((best, point) =>
      best && distance(best) <= distance(point) ? best : point, null)?.atMs;
    this.#draw();
  }

  #x(atMs) {
    const end = this.#points.at(-1).atMs;
    return this.width - RIGHT - (end - atMs) / this.span * (this.width - LEFT - RIGHT);
  }

  #draw() {
    const width = this.canvas.clientWidth;
    if (!width || !this.#points.length) return;
    this.width = width;
    const age = this.#points.at(-1).atMs - this.#points[0].atMs;
    this.span = SPANS_MS.find((span) => span >= age) || SPANS_MS.at(-1);
    const shown = this.#points.filter((point) => this.#x(point.atMs) >= LEFT - 1);
    const each = (point) => this.lines.map(([member]) => point.values[member]);
    const top = roundUp(Math.max(0, ...shown.filter((one) => one.values).flatMap(each)));
    const y = (value) => HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM);
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.canvas.replaceChildren(...this.#grid(top, y), ...this.lines.map(([member], i) =>
      svg("path", { class: `s${i + 1}`, d: this.#path(shown, (values) => y(values[member])) })));
    this.#legend(shown);
  }

  #grid(top, y) {
    const parts = [0, top / 2, top].flatMap((value) => [
      svg("line", { x1: LEFT, x2: this.width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, this.format(value)),
    ]);
    const minutes = this.span / 60_000;
    const below = HEIGHT - 4;
    parts.push(svg("text", { x: LEFT, y: below }, `${minutes} min ago`));
    parts.push(svg("text", { x: this.width - RIGHT, y: below, "text-anchor": "end" }, "now"));
    return parts;
  }

  #path(points, y) {
    let pen = "M";
    return points.map((point) => {
      if (!point.values) {
        pen = "M";
        return "";
      }
      const step = `${pen}${this.#x(point.atMs).toFixed(1)} ${y(point.values).toFixed(1)}`;
      pen = "L";
      return step;
    }).join("");
  }

  /** The figures of the time that is pointed at, else the newest. */
  #legend(shown) {
    const at = shown.find((point) => point.atMs === this.#at);
    const point = at || shown.findLast((one) => one.values) || shown.at(-1);
    this.figures.forEach((figure, i) => {
      const value = point?.values?.[this.lines[i][0]];
      say(figure, value == null ? "–" : this.format(value));
    });
    say(this.when, at ? new Date(at.atMs).toLocaleTimeString("sv") : "");
    if (at) {
      const x = this.#x(at.atMs);
      const line = { class: "here", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM };
      this.canvas.append(svg("line", line));
    }
    const said = this.lines.map(([, name], i) => `${name} ${this.figures[i].textContent}`);
    this.canvas.setAttribute("aria-label", `${this.title}: ${said.join(", ")}`);
  }
}

/** The two charts of a queue, or of all together. */
export function charts() {
  const rates = new Chart("Tasks per second",
    [["created", "created"], ["claimed", "claimed"], ["completed", "completed"],
      ["lost", "failed or dead"]], rate);
  const depths = new Chart("Tasks by state",
    [["ready", "ready"], ["inProgress", "in progress"], ["delayed", "delayed"],
      ["dlq", "dead letters"]], short);
  return {
    element: make("div", { class: "charts" }, rates.element, depths.element),
    update(history, key) {
      rates.update(history.over(key, "rates").map(({ atMs, values }) => ({
        atMs, values: values && { ...values, lost: values.failed + values.dead },
      })));
      depths.update(history.over(key, "depths"));
    },
  };
}
