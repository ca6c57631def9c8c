/** What the tab remembers of the last minutes, and what follows from two polls.

The server keeps no history: it counts since its start, and here differences are taken. */

const KEPT_MS = 600_000;
/** Polls nearer to each other than this leave only the newer one behind. */
const APART_MS = 5_000;
const RATE_MS = 10_000;
const LATENCY_MS = 60_000;
export const DEPTHS = ["ready", "delayed", "inProgress", "dlq"];
export const COUNTS = ["created", "claimed", "completed", "failed", "dead", "expiredLeases"];

/** A queue's name among those of all tenants; no tenant has a slash. */
export function keyOf(queue) {
  return `${queue.tenantId || ""}/${queue.command}`;
}

/** One row that is all rows together. */
export function together(rows, buckets) {
  const sum = { latencyCounts: new Array(buckets).fill(0), oldestReadySeconds: 0 };
  for (const name of [...DEPTHS, ...COUNTS]) sum[name] = 0;
  for (const row of rows) {
    for (const name of [...DEPTHS, ...COUNTS]) sum[name] += row[name];
    (row.latencyCounts || []).forEach((count, i) => { sum.latencyCounts[i] += count; });
    sum.oldestReadySeconds = Math.max(sum.oldestReadySeconds, row.oldestReadySeconds);
  }
  return sum;
}

/** How much more it is than before; a count that is smaller began anew. */
function more(now, before) {
  return now >= before ? now - before : now;
}

/** Counts per second between two rows; `before` undefined: there was none. */
function perSecond(row, before, seconds) {
  const rates = {};
  for (const name of COUNTS) rates[name] = more(row[name], before?.[name] || 0) / seconds;
  return rates;
}

/** Where the part `share` of the counted ends: {seconds, kind}, kind "in", "below" (the shortest
    bucket, which says no more) or "above" (the last bound); null when nothing was counted. */
export function percentile(share, bounds, counts) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (!all) return null;
  let left = share * all;
  for (const [i, count] of counts.entries()) {
    if (count && left <= count) {
      if (i >= bounds.length) return { seconds: bounds.at(-1), kind: "above" };
      if (i === 0) return { seconds: bounds[0], kind: "below" };
      const part = left / count;
      return { seconds: bounds[i - 1] + part * (bounds[i] - bounds[i - 1]), kind: "in" };
    }
    left -= count;
  }
  return { seconds: bounds.at(-1), kind: "above" };
}

export class History {
  #samples = [];
  #life = 0;

  /** Takes in an overview. */
  add(overview) {
    const last = this.#samples.at(-1);
    if (last && overview.uptimeSeconds < last.uptimeSeconds) this.#life += 1;
    const buckets = overview.latencyBoundsSeconds.length + 1;
    const sample = {
      atMs: Date.parse(overview.at),
      uptimeSeconds: overview.uptimeSeconds,
      life: this.#life,
      bounds: overview.latencyBoundsSeconds,
      rows: new Map(overview.queues.map((queue) => [keyOf(queue), queue])),
      total: together(overview.queues, buckets),
      commits: overview.commits,
      syncs: overview.syncs,
    };
    const before = this.#samples.at(-2);
    const near = before && before.life === last.life && last.life === sample.life
      && last.atMs - before.atMs < APART_MS;
    if (near) this.#samples.pop();
    this.#samples.push(sample);
    const oldest = sample.atMs - KEPT_MS - APART_MS;
    this.#samples = this.#samples.filter((one) => one.atMs >= oldest && one.atMs <= sample.atMs);
  }

  get last() {
    return this.#samples.at(-1);
  }

  /** The youngest sample of this life of the server that is at least so old, else its oldest. */
  #before(ageMs) {
    const last = this.last;
    const lived = this.#samples.filter((one) => one.life === last.life && one !== last);
    return lived.findLast((one) => last.atMs - one.atMs >= ageMs) || lived[0];
  }

  /** Rates of a queue by its key, of everything without one; null until there are two polls. */
  rates(key) {
    const last = this.last, before = last && this.#before(RATE_MS);
    const row = last && rowOf(last, key);
    if (!before || !row || last.atMs <= before.atMs) return null;
    return perSecond(row, rowOf(before, key), (last.atMs - before.atMs) / 1000);
  }

  /** Depths or rates over time: [{atMs, values}], values null where they cannot be told. */
  over(key, kind) {
    return this.#samples.map((sample, i) => {
      const row = rowOf(sample, key);
      if (kind === "depths") return { atMs: sample.atMs, values: row || null };
      const before = this.#samples[i - 1];
      const told = row && before && before.life === sample.life && before.atMs < sample.atMs;
      const seconds = told && (sample.atMs - before.atMs) / 1000;
      return { atMs: sample.atMs,
        values: told ? perSecond(row, rowOf(before, key), seconds) : null };
    });
  }

  /** Times from create to end in the last minute: {bounds, counts}, null before two polls. */
  latency(key) {
    const last = this.last, before = last && this.#before(LATENCY_MS);
    const row = last && rowOf(last, key);
    if (!before || !row) return null;
    const old = rowOf(before, key)?.latencyCounts || [];
    const counts = (row.latencyCounts || []).map((count, i) => more(count, old[i] || 0));
    return { bounds: last.bounds, counts };
  }

  /** Times of `commits` or `syncs` in the last minute, likewise. */
  durations(what) {
    const last = this.last, before = last && this.#before(LATENCY_MS);
    if (!before) return null;
    const each = (durations) => durations.buckets.map((bucket, i, all) =>
      bucket.count - (i ? all[i - 1].count : 0));
    const old = each(before[what]);
    return {
      bounds: last[what].buckets.slice(0, -1).map((bucket) => bucket.le),
      counts: each(last[what]).map((count, i) => count - old[i]),
    };
  }
}

function rowOf(sample, key) {
  return key === undefined ? sample.total : sample.rows.get(key);
}
