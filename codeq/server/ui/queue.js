/** One queue: figures, pause and purge, its dead letters and other tasks. */

import { queuePath } from "./api.js";
import { charts } from "./chart.js";
import { agreed, button, make, say } from "./elements.js";
import { count, many, moment } from "./figures.js";
import { keyOf } from "./history.js";
import { Figures } from "./queues.js";
import { facts, taskLink } from "./task.js";

const PAGE_TASKS = 50;
const LISTS = [["dead", "Dead letters"], ["PENDING", "Pending"], ["IN_PROGRESS", "In progress"],
  ["COMPLETED", "Completed"], ["FAILED", "Failed"]];
const EMPTY = { ready: 0, delayed: 0, inProgress: 0, dlq: 0 };

export class QueueView {
  #named = null;
  #busy = false;

  constructor(page) {
    this.page = page;
    this.title = make("h2", { tabindex: "-1" });
    this.badge = make("span", { class: "badge", hidden: true }, "paused");
    this.pause = button("Pause", () => this.#pause());
    const states = [["all", "ready and delayed"], ["ready", "ready"], ["delayed", "delayed"]];
    this.waiting = make("select", { id: "purge-state" }, ...states.map(([value, name]) =>
      make("option", { value }, name)));
    this.purge = button("Purge waiting…", () => this.#purgeWaiting(), { class: "danger" });
    this.figures = new Figures();
    this.charts = charts();
    this.list = new TaskList(this);
    this.element = make("section", { "aria-label": "Queue" },
      make("p", {}, make("a", { href: "#queues" }, "All queues")),
      make("div", { class: "above" }, make("div", {}, this.title, this.badge),
        make("div", { class: "buttons" }, this.pause,
          make("label", { for: "purge-state" }, "Waiting tasks ", this.waiting), this.purge)),
      this.figures.element, this.charts.element, this.list.element);
  }

  show(query) {
    const command = query.get("command") || "", tenant = query.get("tenant") || "";
    const named = { command, tenantId: tenant };
    if (!this.#named || keyOf(named) !== keyOf(this.#named)) {
      this.#named = named;
      say(this.title, tenant ? `${command} of ${tenant}` : command);
      this.list.begin();
    }
    this.update();
  }

  /** The query that names the tenant, for an operator. */
  get query() {
    return this.#named.tenantId ? { tenant: this.#named.tenantId } : {};
  }

  get command() {
    return this.#named.command;
  }

  /** How the queue is called in a question. */
  get name() {
    const { command, tenantId } = this.#named;
    return tenantId ? `${command} of tenant ${tenantId}` : command;
  }

  get row() {
    return this.page.queues().find((row) => keyOf(row) === keyOf(this.#named));
  }

  update() {
    const { history } = this.page;
    if (!this.#named || !history.last) return;
    const row = this.row || EMPTY;
    this.badge.hidden = !row.paused;
    say(this.pause, row.paused ? "Resume…" : "Pause…");
    this.purge.disabled = !(row.ready + row.delayed);
    this.figures.update(history, keyOf(this.#named), row);
    this.charts.update(history, keyOf(this.#named));
    this.list.update(row);
  }

  async #pause() {
    const { ready = 0, paused = false } = this.row || EMPTY;
    const title = `${paused ? "Resume" : "Pause"} queue ${this.name}?`;
    const text = paused
      ? `${many(ready, "ready task")} can be claimed again.`
      : `Nobody can claim its ${many(ready, "ready task")} until it is resumed. Creates go on, and `
        + "tasks that are in progress can be finished.";
    const what = paused ? "resume" : "pause";
    await this.change(title, text, paused ? "Resume" : "Pause", { bad: !paused }, async () => {
      await this.page.api.post(queuePath(this.command, what), this.query);
      return paused ? `${this.name} is resumed.` : `${this.name} is paused.`;
    });
  }

  async #purgeWaiting() {
    const state = this.waiting.value, row = this.row || EMPTY;
    const ready = state === "delayed" ? 0 : row.ready;
    const delayed = state === "ready" ? 0 : row.delayed;
    const parts = [state !== "delayed" && `${count(ready)} ready`,
      state !== "ready" && `${count(delayed)} delayed`].filter(Boolean);
    await this.change(`Purge ${many(ready + delayed, "waiting task")} of queue ${this.name}?`,
      `${parts.join(" and ")} as of the last poll. They end as FAILED with the error CANCELLED; `
        + "this cannot be undone.",
      "Purge", { bad: true }, async () => {
        const path = queuePath(this.command, "purge");
        const done = await this.page.api.post(path, this.query, { state });
        return `${many(done.purged, "waiting task")} of ${this.name} purged.`;
      });
  }

  /** Asks, does it, says what came of it and looks again. */
  async change(title, text, yes, how, act) {
    if (this.#busy || !(await agreed(title, text, yes, how))) return;
    this.#busy = true;
    try {
      this.page.say(await act());
    } catch (error) {
      this.page.say(error.message, true);
    } finally {
      this.#busy = false;
    }
    this.list.load();
    this.page.soon();
  }
}

/** Pages of the tasks of a queue; dead letters can be chosen, requeued and purged. */
class TaskList {
  #cursors = [""];
  #chosen = new Set();
  #tasks = [];
  #loads = 0;
  #known = "";

  constructor(view) {
    this.view = view;
    this.which = make("select", { id: "list" }, ...LISTS.map(([value, name]) =>
      make("option", { value }, name)));
    this.which.addEventListener("change", () => this.#restart());
    this.note = make("p", { class: "quiet", role: "status" });
    this.rows = make("ul", { class: "tasks" });
    this.every = make("input", { type: "checkbox", id: "every" });
    this.every.addEventListener("change", () => this.#chooseAll(this.every.checked));
    const danger = { class: "danger" };
    this.actions = make("div", { class: "buttons" },
      make("label", { for: "every", class: "check" }, this.every, " All of this page"),
      this.requeueChosen = button("Requeue chosen…", () => this.#chosenTo("requeue")),
      this.purgeChosen = button("Purge chosen…", () => this.#chosenTo("purge"), danger),
      this.requeueAll = button("Requeue all…", () => this.#allTo("requeue")),
      this.purgeAll = button("Purge all…", () => this.#allTo("purge"), danger));
    this.back = button("Previous page", () => this.#turn(-1));
    this.on = button("Next page", () => this.#turn(1));
    this.element = make("div", {},
      make("div", { class: "above" }, make("h3", {}, "Tasks"),
        make("div", { class: "buttons" }, make("label", { for: "list" }, "Show ", this.which),
          button("Refresh", () => this.load()))),
      this.actions, this.note, this.rows, make("div", { class: "buttons" }, this.back, this.on));
  }

  /** Begins with the dead letters of another queue. */
  begin() {
    this.which.value = "dead";
    this.rows.replaceChildren();
    this.#restart();
  }

  #restart() {
    this.#cursors = [""];
    this.#chosen.clear();
    this.load();
  }

  #turn(step) {
    if (step > 0) this.#cursors.push(this.next);
    else this.#cursors.pop();
    this.#chosen.clear();
    this.load();
  }

  /** Reads the page again; what comes after a later call is dropped. */
  async load() {
    const number = this.#loads += 1;
    const dead = this.which.value === "dead";
    const { api } = this.view.page, { command } = this.view;
    const query = { ...this.view.query, limit: PAGE_TASKS, cursor: this.#cursors.at(-1) };
    try {
      const page = dead
        ? await api.get(queuePath(command, "dead"), query)
        : await api.get("/admin/tasks", { ...query, command, status: this.which.value });
      if (number !== this.#loads) return;
      this.next = page.nextCursor || "";
      this.#draw(page, dead);
    } catch (error) {
      if (number === this.#loads) say(this.note, `Not loaded: ${error.message}`);
    }
  }

  /** A change of the queue has the first page read again, unless somebody is at work on it. */
  update(row) {
    this.dead = row.dlq;
    const known = JSON.stringify([row.dlq, row.ready, row.delayed, row.claimed, row.completed,
      row.failed]);
    const working = this.#chosen.size || this.#cursors.length > 1
      || this.rows.querySelector("details[open]") || this.rows.contains(document.activeElement);
    if (known !== this.#known && !working) this.load();
    this.#known = known;
    this.#buttons();
  }

  #draw(page, dead) {
    this.#tasks = page.tasks;
    const there = new Set(page.tasks.map((task) => task.id));
    for (const id of this.#chosen) if (!there.has(id)) this.#chosen.delete(id);
    this.rows.replaceChildren(...page.tasks.map((task) => this.#line(task, dead)));
    const place = page.deadLetterTopicRef
      ? ` The topic's policy names ${page.deadLetterTopicRef} for them.` : "";
    const more = this.next ? ", there are more" : "";
    const listed = `${many(page.tasks.length, "task")} on this page${more}.`;
    say(this.note, (page.tasks.length || this.next ? listed : "There are none.") + place);
    this.back.hidden = this.#cursors.length < 2;
    this.on.hidden = !this.next;
    this.actions.hidden = !dead;
    this.#buttons();
  }

  #line(task, dead) {
    const box = dead && make("input", { type: "checkbox", "aria-label": `Choose ${task.id}` });
    if (box) {
      box.checked = this.#chosen.has(task.id);
      box.addEventListener("change", () => {
        if (box.checked) this.#chosen.add(task.id);
        else this.#chosen.delete(task.id);
        this.#buttons();
      });
    }
    const more = make("details", {}, make("summary", {},
      make("code", {}, task.id), " ",
      make("span", { class: "bad" }, task.error || ""), " ",
      make("span", { class: "quiet" },
        `${many(task.attempts, "attempt")}, ${moment(task.updatedAt)}`)));
    more.addEventListener("toggle", () => more.append(
      make("p", {}, make("a", { href: taskLink(task) }, "Follow this task")), facts(task)),
    { once: true });
    return make("li", {}, box || null, more);
  }

  #chooseAll(chosen) {
    for (const box of this.rows.querySelectorAll("li > input")) {
      if (box.checked !== chosen) box.click();
    }
  }

  #buttons() {
    const chosen = this.#chosen.size;
    this.every.checked = chosen > 0 && chosen === this.#tasks.length;
    this.every.indeterminate = chosen > 0 && chosen < this.#tasks.length;
    this.requeueChosen.disabled = this.purgeChosen.disabled = !chosen;
    this.requeueAll.disabled = this.purgeAll.disabled = !this.dead;
  }

  #chosenTo(what) {
    const ids = [...this.#chosen];
    return this.#change(what, ids.length, { ids });
  }

  #allTo(what) {
    return this.#change(what, this.dead, { limit: this.dead }, "all ");
  }

  /** Requeues or purges so many dead letters, which `body` names. */
  #change(what, number, body, all = "") {
    const verb = what === "requeue" ? "Requeue" : "Purge";
    const text = what === "requeue"
      ? "They become ready at once, with their attempts counted anew."
      : "They are removed for good; this cannot be undone.";
    const title = `${verb} ${all}${many(number, "dead letter")} of queue ${this.view.name}?`;
    return this.view.change(title, text, verb, { bad: what === "purge" }, async () => {
      const path = queuePath(this.view.command, `dead/${what}`);
      const done = await this.view.page.api.post(path, this.view.query, body);
      this.#chosen.clear();
      this.#cursors = [""];
      return what === "requeue" ? `${many(done.requeued, "dead letter")} requeued.`
        : `${many(done.purged, "dead letter")} purged.`;
    });
  }
}
