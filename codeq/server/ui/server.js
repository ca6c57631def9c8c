/** Views of what is not of one queue: leases by worker, and the server itself. */

import { Table, Tile, make, say, tiles } from "./elements.js";
import { bounded, bytes, count, moment, seconds } from "./figures.js";
import { percentile } from "./history.js";
import { taskLink } from "./task.js";

function keyOf(row) {
  return `${row.tenantId || ""}/${row.workerId}`;
}

export class WorkersView {
  constructor(page) {
    this.page = page;
    this.filter = make("input",
      { type: "search", id: "worker-filter", placeholder: "part of a name" });
    this.filter.addEventListener("input", () => this.update());
    this.table = new Table("Leases by worker", [
      { name: "Worker", text: (row) => row.workerId },
      { name: "Tenant", text: (row) => row.tenantId || "" },
      { name: "Leases", number: true, text: (row) => count(row.leases),
        value: (row) => row.leases },
    ], keyOf, { sortBy: 2, up: false, nothing: "No worker holds a lease." });
    this.note = make("p", { class: "quiet" });
    this.element = make("section", { "aria-label": "Workers" },
      make("div", { class: "above" }, make("h2", {}, "Leases by worker"),
        make("label", { for: "worker-filter" }, "Filter ", this.filter)),
      this.note, this.table.element);
  }

  show() {
    this.update();
  }

  update() {
    const { overview } = this.page;
    if (!overview) return;
    const word = this.filter.value.toLowerCase();
    const left = overview.leasesLeftOut;
    this.note.hidden = !left;
    say(this.note, `${count(left)} more workers hold leases; the first by name are listed.`);
    this.table.element.classList.toggle("no-tenant", !this.page.operator);
    const fits = ({ workerId, tenantId = "" }) =>
      `${workerId} ${tenantId}`.toLowerCase().includes(word);
    this.table.update(overview.leases.filter(fits), overview.leases.length);
  }
}

export class ServerView {
  constructor(page) {
    this.page = page;
    const tile = (name, read, hint) => ({ tile: new Tile(name, hint), read });
    this.figures = [
      tile("Version", (seen) => seen.version),
      tile("Up", (seen) => seconds(seen.uptimeSeconds)),
      tile("Live tasks", (seen) => count(seen.liveTasks), "Tasks that have not ended"),
      tile("Waiting claims", (seen) => count(seen.waitingClaims)),
      tile("Producer streams", (seen) => open(seen.streams.producer)),
      tile("Worker streams", (seen) => open(seen.streams.worker)),
      tile("Memory", (seen) => bytes(seen.memory.residentBytes), "Of the process, in RAM"),
      tile("Payloads", (seen) => bytes(seen.memory.payloadBytes), "Held in memory"),
      tile("Disk free", (seen) => bytes(seen.diskFreeBytes)),
      tile("Webhooks pending", (seen) => count(seen.webhooks.pending)),
      tile("Webhooks given up", (seen) => count(seen.webhooks.exhaustedCount)),
    ];
    this.times = ["commits", "syncs"].flatMap((what) => [0.5, 0.95, 0.99].map((share) => ({
      what, share, tile: new Tile(`${what === "commits" ? "Commit" : "Sync"} p${share * 100}`),
    })));
    this.raft = make("dl", { class: "facts" });
    this.webhooks = new Table("Webhooks given up", [
      { name: "At", text: (row) => moment(row.at), value: (row) => row.at },
      { name: "Task", text: (row) => row.taskId,
        href: (row) => taskLink({ id: row.taskId, tenantId: row.tenantId }) },
      { name: "Queue", text: (row) => row.command }, { name: "Host", text: (row) => row.host },
      { name: "Tries", number: true, text: (row) => count(row.tries), value: (row) => row.tries },
      { name: "Error", text: (row) => row.error },
    ], (row) => `${row.taskId} ${row.at}`,
    { up: false, nothing: "None since the server started." });
    this.element = make("section", { "aria-label": "Server" }, make("h2", {}, "Server"),
      tiles(this.figures.map((one) => one.tile)),
      make("h3", {}, "Commits and syncs of the last minute"),
      tiles(this.times.map((one) => one.tile)),
      make("h3", {}, "Raft"), this.raft,
      make("h3", {}, "Webhooks given up"), this.webhooks.element);
  }

  show() {
    this.update();
  }

  async update() {
    const { overview, history } = this.page;
    if (!overview) return;
    for (const { tile, read } of this.figures) tile.set(read(overview));
    for (const { what, share, tile } of this.times) {
      const times = history.durations(what);
      tile.set(times ? bounded(percentile(share, times.bounds, times.counts)) : "–");
    }
    this.webhooks.update(overview.webhooks.exhausted);
    try {
      this.#showRaft(await this.page.api.get("/raft/status"));
    } catch {
      // The status line says what is wrong; the panel keeps what it last showed.
    }
  }

  #showRaft(status) {
    const rows = [["Replication", status.enabled ? "on" : "off: this node is the only one"],
      ["Groups", count(status.numGroups)],
      ...(status.groups || []).map((group) => [`Shard ${group.shardIdx}`,
        group.isLeader ? "led here" : group.hasLeader ? `led by ${group.leaderId}` : "no leader"])];
    const shown = JSON.stringify(rows);
    if (shown === this.shownRaft) return;
    this.shownRaft = shown;
    this.raft.replaceChildren(...rows.map(([name, text]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, text))));
  }
}

function open(streams) {
  return streams === undefined ? "off" : count(streams);
}
