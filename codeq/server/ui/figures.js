/** Numbers and times as they are shown. */

const WHOLE = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export function count(value) {
  return WHOLE.format(value);
}

/** A count in few characters: 12.3K. */
export function short(value) {
  return value < 10_000 ? WHOLE.format(value) : SHORT.format(value);
}

/** "1 task", "2 tasks" */
export function many(value, word) {
  return `${count(value)} ${word}${value === 1 ? "" : "s"}`;
}

/** Per second; null is not known. */
export function rate(value) {
  if (value == null) return "–";
  if (value === 0) return "0";
  if (value < 10) return value.toFixed(value < 0.1 ? 2 : 1);
  return short(Math.round(value));
}

export function seconds(value) {
  if (value < 0.0995) return `${Number((value * 1000).toPrecision(2))} ms`;
  if (value < 99.5) return `${Number(value.toPrecision(value < 1 ? 2 : 3))} s`;
  if (value < 5_970) return `${Math.round(value / 60)} min`;
  if (value < 171_900) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86_400)} d`;
}

/** A percentile of history.js. */
export function bounded(found) {
  if (!found) return "–";
  return { in: "", below: "< ", above: "> " }[found.kind] + seconds(found.seconds);
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${place && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
}

/** A time of the server in the person's zone, with the day. */
export function moment(text) {
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return text;
  const day = time.toLocaleDateString("sv"), hour = time.toLocaleTimeString("sv");
  return `${day} ${hour}`;
}
