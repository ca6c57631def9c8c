/** One task by its id, followed until it has ended. */

import { Refused } from "./api.js";
import { agreed, button, make, pretty, say } from "./elements.js";
import { moment } from "./figures.js";
import { queueLink } from "./queues.js";

const STATES = {
  PENDING_LIST: "ready", DELAYED_ZSET: "delayed", INPROG_SET: "leased", DLQ_SET: "dead letter",
};
/** Members that have their own place, or a better name. */
const APART = new Set(["payload", "lastKnownLocation", "status"]);
const TIMES = new Set(["createdAt", "updatedAt", "leaseUntil", "completedAt"]);

export function taskLink(task) {
  return `#task?${new URLSearchParams({ id: task.id, tenant: task.tenantId })}`;
}

/** Where a task is, in a word. */
export function stateOf(task) {
  return STATES[task.lastKnownLocation] || task.status.toLowerCase();
}

/** Every member of a task, and its payload. */
export function facts(task) {
  const rows = Object.entries(task).filter(([name]) => !APART.has(name)).map(([name, value]) =>
    fact(name, TIMES.has(name) ? moment(value) : String(value)));
  return make("div", {},
    make("dl", { class: "facts" },
      fact("state", stateOf(task)), fact("status", task.status), ...rows),
    make("h4", {}, "Payload"), make("pre", { tabindex: "0" }, pretty(task.payload)));
}

function fact(name, text) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, text));
}

/** What is known of the end; `record` has its numbers as they were sent. */
function ending(record) {
  const parts = [make("h4", {}, "Result record"),
    make("dl", { class: "facts" }, fact("status", record.status),
      fact("completedAt", moment(record.completedAt)))];
  if (record.error) parts.push(make("pre", { class: "bad", tabindex: "0" }, record.error));
  if ("result" in record) {
    parts.push(make("pre", { tabindex: "0" }, pretty(JSON.stringify(record.result))));
  }
  for (const { name, url } of record.artifacts || []) {
    parts.push(make("p", {}, `Artifact ${name}: `, make("code", {}, url)));
  }
  return make("div", {}, ...parts);
}

/** JSON with numbers that a script cannot hold kept as their text, where the browser can. */
function exact(text) {
  return JSON.parse(text, (_, value, context) => {
    const source = context?.source;
    const held = typeof value !== "number" || String(value) === source;
    return held || !source || !JSON.rawJSON ? value : JSON.rawJSON(source);
  });
}

export class TaskView {
  #asked = null;
  #ended = false;
  #loads = 0;

  constructor(page) {
    this.page = page;
    this.input = make("input", { id: "task-id", spellcheck: "false", autocomplete: "off",
      placeholder: "0197f3c0-5a00-7000-8000-000000000001", required: true });
    const form = make("form", { role: "search" },
      make("label", { for: "task-id" }, "Task id"), this.input,
      make("button", { class: "main" }, "Find"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#find();
    });
    this.note = make("p", { role: "status" });
    this.state = make("p", { class: "state", role: "status" });
    this.cancel = button("Cancel this task…", () => this.#cancel(), { class: "danger" });
    this.queue = make("a", {}, "Its queue");
    this.bar = make("div", { class: "buttons", hidden: true }, this.queue, this.cancel);
    this.found = make("div");
    this.element = make("section", { "aria-label": "Task" },
      make("h2", {}, "Task"), form, this.note, this.state, this.bar, this.found);
  }

  show(query) {
    const asked = { id: query.get("id") || "", tenant: query.get("tenant") || "" };
    if (asked.id !== this.#asked?.id || asked.tenant !== this.#asked?.tenant) this.#clear();
    this.#asked = asked;
    this.input.value = asked.id || this.input.value;
    this.#ended = false;
    this.update();
  }

  #clear() {
    this.task = null;
    this.shown = "";
    this.bar.hidden = true;
    this.found.replaceChildren();
    say(this.state, "");
    say(this.note, "");
  }

  #find() {
    const named = { id: this.input.value.trim() };
    if (this.page.tenant) named.tenant = this.page.tenant;
    const hash = `#task?${new URLSearchParams(named)}`;
    if (location.hash === hash) this.show(new URLSearchParams(named));
    else location.hash = hash;
  }

  get #path() {
    return `/tasks/${encodeURIComponent(this.#asked.id)}`;
  }

  /** The query that names the tenant, for an operator. */
  get #query() {
    return this.page.operator ? { tenant: this.#asked.tenant } : {};
  }

  /** Reads the task again, until it has ended. */
  async update() {
    if (!this.#asked?.id || this.#ended) return;
    const number = this.#loads += 1;
    try {
      const task = await this.page.api.get(this.#path, this.#query);
      const over = task.status === "COMPLETED" || task.status === "FAILED";
      const record = over ? await this.#record() : null;
      if (number === this.#loads) this.#draw(task, record, over);
    } catch (error) {
      if (number !== this.#loads) return;
      const absent = error instanceof Refused && error.status === 404;
      if (absent) this.#clear();
      const hint = absent && this.page.operator && !this.#asked.tenant
        ? " in the tenant of this token; for another one choose it above" : "";
      say(this.note, `${this.#asked.id}: ${error.message}${hint}`);
    }
  }

  async #record() {
    return exact(await this.page.api.text(`${this.#path}/result`, this.#query)).result;
  }

  #draw(task, record, over) {
    // A dead letter has ended, too, but may be made ready again.
    this.#ended = over && task.lastKnownLocation !== "DLQ_SET";
    this.task = task;
    const shown = JSON.stringify([task, record]);
    if (shown === this.shown) return;
    this.shown = shown;
    say(this.note, "");
    say(this.state, `${stateOf(task)}`);
    this.state.className = `state ${task.lastKnownLocation === "DLQ_SET" ? "dead" : task.status}`;
    this.bar.hidden = false;
    this.cancel.hidden = task.status !== "PENDING";
    this.queue.href = queueLink({
      command: task.command, tenantId: this.page.operator ? task.tenantId : "",
    });
    const parts = [facts(task)];
    if (record) parts.push(ending(record));
    this.found.replaceChildren(...parts);
  }

  async #cancel() {
    const { id, command } = this.task;
    const text = `It is one waiting task of queue ${command}. It ends as FAILED with the error `
      + "CANCELLED; this cannot be undone.";
    if (!(await agreed(`Cancel task ${id}?`, text, "Cancel the task", { bad: true }))) return;
    try {
      await this.page.api.post(`${this.#path}/cancel`, this.#query);
      this.page.say(`${id} is cancelled.`);
    } catch (error) {
      this.page.say(error.message, true);
    }
    this.update();
  }
}
