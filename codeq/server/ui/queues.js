/** The first view: everything together, and the queues. */

import { charts } from "./chart.js";
import { Table, Tile, make, tiles } from "./elements.js";
import { bounded, count, rate, seconds, short } from "./figures.js";
import { keyOf, percentile } from "./history.js";

/** Where a queue is shown. */
export function queueLink(queue) {
  const named = { command: queue.command };
  if (queue.tenantId) named.tenant = queue.tenantId;
  return `#queue?${new URLSearchParams(named)}`;
}

/** Tiles of depths, rates and times, of one queue or (no key) of all. */
export class Figures {
  constructor() {
    this.depths = {
      ready: new Tile("Ready"),
      inProgress: new Tile("In progress"),
      delayed: new Tile("Delayed"),
      dlq: new Tile("Dead letters"),
    };
    this.oldest = new Tile("Oldest ready", "How long the oldest ready task has been ready");
    const lately = "Over the last ten seconds";
    this.rates = [
      [(of) => of.created, new Tile("Created /s", lately)],
      [(of) => of.claimed, new Tile("Claimed /s", lately)],
      [(of) => of.completed, new Tile("Completed /s", lately)],
      [(of) => of.failed + of.dead, new Tile("Failed /s", `${lately}, dead letters too`)],
    ];
    const hint = "From create to end, of the tasks that ended in the last minute";
    this.times = [[0.5, new Tile("Latency p50", hint)], [0.95, new Tile("p95", hint)],
      [0.99, new Tile("p99", hint)]];
    this.element = tiles([...Object.values(this.depths), this.oldest,
      ...this.rates.map(([, tile]) => tile), ...this.times.map(([, tile]) => tile)]);
  }

  /** `row` as it is now, null when its counts are not known. */
  update(history, key, row) {
    for (const [name, tile] of Object.entries(this.depths)) {
      tile.set(row ? short(row[name]) : "–", name === "dlq" && row?.dlq > 0);
    }
    this.oldest.set(row?.ready && row.oldestReadySeconds != null
      ? seconds(row.oldestReadySeconds) : "–");
    const rates = history.rates(key);
    for (const [read, tile] of this.rates) tile.set(rates ? rate(read(rates)) : "–");
    const latency = history.latency(key);
    for (const [share, tile] of this.times) {
      tile.set(latency ? bounded(percentile(share, latency.bounds, latency.counts)) : "–");
    }
  }
}

function columns(page) {
  const depth = (name, member) => ({
    name, number: true, text: (row) => count(row[member]), value: (row) => row[member],
    bad: (row) => member === "dlq" && row.dlq > 0,
  });
  const perSecond = (name, member) => ({
    name, number: true, text: (row) => rate(page.history.rates(keyOf(row))?.[member]),
    value: (row) => page.history.rates(keyOf(row))?.[member] ?? -1,
  });
  const p95 = (row) => {
    const latency = page.history.latency(keyOf(row));
    return latency && percentile(0.95, latency.bounds, latency.counts);
  };
  return [
    { name: "Queue", text: (row) => row.command, href: queueLink,
      badge: (row) => (row.paused ? "paused" : "") },
    { name: "Tenant", text: (row) => row.tenantId || "" },
    depth("Ready", "ready"), depth("In progress", "inProgress"), depth("Delayed", "delayed"),
    depth("Dead", "dlq"),
    perSecond("Created /s", "created"), perSecond("Completed /s", "completed"),
    { name: "p95", number: true, text: (row) => bounded(p95(row)),
      value: (row) => p95(row)?.seconds ?? -1 },
    { name: "Oldest ready", number: true, value: (row) => (row.ready ? row.oldestReadySeconds : -1),
      text: (row) => (row.ready && row.oldestReadySeconds != null
        ? seconds(row.oldestReadySeconds) : "–") },
  ];
}

export class QueuesView {
  constructor(page) {
    this.page = page;
    this.figures = new Figures();
    this.charts = charts();
    this.filter = make("input",
      { type: "search", id: "queue-filter", placeholder: "part of a name" });
    this.filter.addEventListener("input", () => this.#list());
    this.table = new Table("Queues", columns(page), keyOf,
      { nothing: "No queue has held a task since the server started." });
    this.note = make("p", { class: "quiet" });
    this.element = make("section", { "aria-label": "Queues" }, this.figures.element,
      this.charts.element,
      make("div", { class: "above" }, make("h2", {}, "Queues"),
        make("label", { for: "queue-filter" }, "Filter ", this.filter)),
      this.note, this.table.element);
  }

  show() {
    this.update();
  }

  update() {
    const { overview, history } = this.page;
    if (!overview) return;
    this.figures.update(history, undefined, history.last.total);
    this.charts.update(history);
    const left = overview.queuesLeftOut;
    this.note.hidden = !left;
    this.note.textContent = left
      ? `The figures above, rates and times are those of the first `
        + `${count(overview.queues.length)} queues by name; `
        + `${count(left)} more are listed with their depths.`
      : "";
    this.#list();
  }

  #list() {
    const rows = this.page.queues();
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) => {
      const text = `${row.command} ${row.tenantId || ""}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    this.table.element.classList.toggle("no-tenant", !this.page.operator);
    this.table.update(rows.filter(fits), rows.length);
  }
}
