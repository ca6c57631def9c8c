/** The dashboard: who is signed in, the polling, and which view is shown. */

import { Api, Away } from "./api.js";
import { make, say } from "./elements.js";
import { many, seconds } from "./figures.js";
import { History, keyOf } from "./history.js";
import { QueueView } from "./queue.js";
import { QueuesView } from "./queues.js";
import { ServerView, WorkersView } from "./server.js";
import { TaskView } from "./task.js";

const POLL_MS = 2_000;
const HIDDEN_POLL_MS = 10_000;
const BACKOFF_MS_MAX = 30_000;
/** A poll may take up to this part of the time. */
const SHARE = 0.1;
const REST_MS = 15_000;
const TOKEN = "codeq-token";

const $ = (id) => document.getElementById(id);

/** What the views see of the page. */
class Page {
  #timer = 0;
  #polls = 0;
  #failures = 0;
  #rest = [];
  #restAtMs = -Infinity;

  constructor() {
    this.views = {
      queues: new QueuesView(this), queue: new QueueView(this), task: new TaskView(this),
      workers: new WorkersView(this), server: new ServerView(this),
    };
    $("views").append(...Object.values(this.views).map((view) => view.element));
    $("sign-in").addEventListener("submit", (event) => {
      event.preventDefault();
      this.begin($("token").value.trim());
    });
    $("sign-out").addEventListener("click", () => this.#end(""));
    $("tenant").addEventListener("change", () => this.#choose($("tenant").value));
    window.addEventListener("hashchange", () => this.#route());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.api) this.soon();
    });
    const kept = sessionStorage.getItem(TOKEN);
    if (kept) this.begin(kept);
    else this.#end("");
  }

  /** Polls with a token for the first time. */
  begin(token) {
    this.api = new Api(token);
    this.#forget();
    this.operator = false;
    this.tenant = "";
    this.tenants = new Set();
    say($("refused"), "");
    say($("status"), "Signing in…");
    this.soon();
  }

  /** Says what came of a change. */
  say(text, bad = false) {
    const said = $("said");
    said.hidden = false;
    said.className = bad ? "bad" : "good";
    said.textContent = text;
  }

  /** Polls at once. */
  soon() {
    clearTimeout(this.#timer);
    this.#poll();
  }

  /** Every queue that is known of, those without counts too. */
  queues() {
    const shown = this.overview?.queues || [];
    if (!this.overview?.queuesLeftOut) return shown;
    const there = new Set(shown.map(keyOf));
    return [...shown, ...this.#rest.filter((row) => !there.has(keyOf(row)))];
  }

  #forget() {
    this.history = new History();
    this.overview = null;
    this.#rest = [];
    this.#restAtMs = -Infinity;
    this.#failures = 0;
  }

  /** Goes back to the form; the token is forgotten. */
  #end(why) {
    clearTimeout(this.#timer);
    this.#polls += 1;
    this.api = null;
    this.#forget();
    sessionStorage.removeItem(TOKEN);
    say($("refused"), why);
    say($("status"), "");
    say($("updated"), "");
    $("said").hidden = true;
    for (const id of ["nav", "who", "views"]) $(id).hidden = true;
    $("sign-in").hidden = false;
    $("token").value = "";
    $("token").focus();
  }

  #choose(tenant) {
    this.tenant = tenant;
    this.#forget();
    if (this.view === this.views.queue) location.hash = "#queues";
    this.soon();
  }

  async #poll() {
    const number = this.#polls += 1;
    const { api } = this;
    const began = performance.now();
    let wait;
    try {
      const overview = await api.get("/admin/overview", { tenant: this.tenant });
      const rest = overview.queuesLeftOut ? await this.#others(api) : [];
      if (number !== this.#polls) return;
      this.#took(overview, rest);
      const took = performance.now() - began;
      wait = Math.max(document.hidden ? HIDDEN_POLL_MS : POLL_MS, took / SHARE);
    } catch (error) {
      if (number !== this.#polls) return;
      wait = this.#failed(error);
    }
    if (this.api) this.#timer = setTimeout(() => this.#poll(), wait);
  }

  /** Depths of all queues; read less often, since there are many. */
  async #others(api) {
    if (performance.now() - this.#restAtMs < REST_MS) return this.#rest;
    const { queues } = await api.get("/admin/queues", { tenant: this.tenant });
    this.#restAtMs = performance.now();
    return queues;
  }

  #took(overview, rest) {
    const first = !this.overview;
    this.overview = overview;
    this.#rest = rest;
    this.history.add(overview);
    this.#failures = 0;
    this.#tenants();
    if (first) {
      sessionStorage.setItem(TOKEN, this.api.token);
      $("sign-in").hidden = true;
      for (const id of ["nav", "who", "views"]) $(id).hidden = false;
      this.#route();
    } else {
      this.view.update();
    }
    say($("status"), "Connected");
    $("line").className = "";
    const at = new Date(overview.at).toLocaleTimeString("sv");
    say($("updated"), `as of ${at}, up ${seconds(overview.uptimeSeconds)}`);
  }

  /** What is said of a poll that failed, and after how many ms the next one comes. */
  #failed(error) {
    this.#failures += 1;
    if (!this.overview && [401, 403].includes(error.status)) {
      this.#end(this.#why(error));
      return 0;
    }
    const asked = (error.retryAfterSeconds || 0) * 1000;
    const wait = Math.max(asked, Math.min(BACKOFF_MS_MAX, 500 * 2 ** this.#failures));
    const every = many(Math.ceil(wait / 1000), "second");
    say($("status"), `${this.#why(error)} Trying again every ${every}.`);
    $("line").className = "bad";
    return wait;
  }

  #why(error) {
    if (error.status === 401) return `The token was not accepted: ${error.message}.`;
    if (error.status === 403) {
      return `This token may not see this page: ${error.message}. It needs the scope `
        + "codeq:admin or codeq:operator.";
    }
    if (error.status === 429) return `Too many requests: ${error.message}.`;
    if (error.status) return `The server refuses with ${error.status}: ${error.message}.`;
    if (error instanceof Away) return "The server does not answer.";
    console.error(error);
    return `This page failed: ${error.message}.`;
  }

  /** Entries that name their tenant are an operator's; the tenants seen so far can be picked. */
  #tenants() {
    const { queues, leases } = this.overview;
    for (const { tenantId } of [...queues, ...leases]) if (tenantId) this.tenants.add(tenantId);
    this.operator = this.tenants.size > 0;
    $("tenant-label").hidden = !this.operator;
    const wanted = ["", ...[...this.tenants].sort()];
    const there = [...$("tenant").options].map((option) => option.value);
    if (wanted.join() === there.join()) return;
    $("tenant").replaceChildren(...wanted.map((tenant) =>
      make("option", { value: tenant }, tenant || "all")));
    $("tenant").value = this.tenant;
  }

  #route() {
    if (!this.overview) return;
    const [name, query] = location.hash.slice(1).split(/\?(.*)/s);
    const chosen = name in this.views ? name : "queues";
    for (const [which, view] of Object.entries(this.views)) view.element.hidden = which !== chosen;
    for (const link of $("nav").querySelectorAll("a")) {
      const here = link.hash === `#${chosen}` || (chosen === "queue" && link.hash === "#queues");
      if (here) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    this.view = this.views[chosen];
    this.view.show(new URLSearchParams(query || ""));
  }
}

new Page();
