/** Elements of the page. Whatever comes from the server is put in as text. */

/** An element with attributes (true: without a value; false, null: left out) and children. */
export function make(tag, attributes = {}, ...children) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) one.setAttribute(name, "");
    else if (value !== false && value != null) one.setAttribute(name, value);
  }
  one.append(...children.filter((child) => child != null));
  return one;
}

export function button(text, click, attributes = {}) {
  const one = make("button", { type: "button", ...attributes }, text);
  one.addEventListener("click", click);
  return one;
}

/** Sets a text only if it is another: nothing selected is lost, nothing is read out twice. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Asks before a change; true once the person has agreed. */
export function agreed(title, text, yes, { bad = false } = {}) {
  const dialog = document.getElementById("confirm");
  const agree = document.getElementById("confirm-yes");
  say(document.getElementById("confirm-title"), title);
  say(document.getElementById("confirm-text"), text);
  say(agree, yes);
  agree.classList.toggle("danger", bad);
  dialog.returnValue = "";
  return new Promise((resolve) => {
    agree.onclick = () => dialog.close("yes");
    document.getElementById("confirm-no").onclick = () => dialog.close("");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
    dialog.showModal();
    document.getElementById("confirm-no").focus();
  });
}

/** A box with a name and a figure that `set` changes. */
export class Tile {
  constructor(name, hint = "") {
    this.value = make("dd", {}, "–");
    this.element = make("div", { class: "tile", title: hint || null },
      make("dt", {}, name), this.value);
  }

  set(text, bad = false) {
    say(this.value, text);
    this.value.classList.toggle("bad", bad);
  }
}

export function tiles(list) {
  return make("dl", { class: "tiles" }, ...list.map((tile) => tile.element));
}

/** JSON with line breaks, its numbers and texts as they are; any other text unchanged. */
export function pretty(text) {
  try {
    if (typeof JSON.parse(text) !== "object") return text;
  } catch {
    return text;
  }
  let depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|[[\]{}:,]|[^\s"[\]{}:,]+/g);
  return tokens.map((token, i) => {
    if ("[{".includes(token)) {
      if ("]}".includes(tokens[i + 1])) return token;
      depth += 1;
      return token + line();
    }
    if ("]}".includes(token)) {
      if ("[{".includes(tokens[i - 1])) return token;
      depth -= 1;
      return line() + token;
    }
    if (token === ",") return token + line();
    return token === ":" ? ": " : token;
  }).join("");
}

/** Rows by key under sortable heads; of many rows the first `SHOWN_MAX` are shown.

A column: {name, text(row), href(row), value(row) to sort by, number, badge(row)}. */
export class Table {
  static SHOWN_MAX = 200;
  #lines = new Map();
  #rows = [];
  #up = true;

  constructor(caption, columns, keyOf, { sortBy = 0, up = true, nothing = "Nothing." } = {}) {
    this.columns = columns;
    this.keyOf = keyOf;
    this.nothing = nothing;
    this.sortBy = sortBy;
    this.#up = up;
    this.heads = columns.map((column, i) => {
      const click = button(column.name, () => this.#sort(i));
      return make("th", { scope: "col", class: column.number ? "number" : null }, click);
    });
    this.body = make("tbody");
    this.note = make("p", { class: "quiet note" });
    const table = make("table", {}, make("caption", { class: "unseen" }, caption),
      make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    this.element = make("div", {}, make("div", { class: "scroll" }, table), this.note);
  }

  /** Shows these rows; `all` is how many there are with those that a filter hides. */
  update(rows, all = rows.length) {
    this.#rows = rows;
    this.all = all;
    this.#draw();
  }

  #sort(place) {
    this.#up = place === this.sortBy ? !this.#up : !this.columns[place].number;
    this.sortBy = place;
    this.#draw();
  }

  #draw() {
    this.heads.forEach((head, i) => {
      if (i === this.sortBy) head.setAttribute("aria-sort", this.#up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const column = this.columns[this.sortBy];
    const value = column.value || column.text;
    const order = this.#up ? 1 : -1;
    const sorted = this.#rows.map((row) => [value(row), this.keyOf(row), row]).sort((a, b) =>
      order * compare(a[0], b[0]) || compare(a[1], b[1]));
    const shown = sorted.slice(0, Table.SHOWN_MAX);
    const lines = new Map(shown.map(([, key, row]) => [key, this.#line(key, row)]));
    this.#lines = lines;
    put(this.body, [...lines.values()].map((line) => line.element));
    say(this.note, this.#said(shown.length));
  }

  #said(shown) {
    if (!this.#rows.length) return this.all ? "The filter fits none." : this.nothing;
    const hidden = this.#rows.length - shown;
    return hidden ? `The first ${shown} of ${this.#rows.length} in this order are shown.` : "";
  }

  #line(key, row) {
    const line = this.#lines.get(key) || this.#newLine(row);
    this.columns.forEach((column, i) => {
      say(line.texts[i], column.text(row));
      if (column.badge) {
        const badge = column.badge(row);
        say(line.badges[i], badge);
        line.badges[i].hidden = !badge;
      }
      if (column.bad) line.texts[i].classList.toggle("bad", column.bad(row));
    });
    return line;
  }

  #newLine(row) {
    const texts = this.columns.map((column) =>
      column.href ? make("a", { href: column.href(row) }) : make("span"));
    const badges = this.columns.map((column) =>
      column.badge ? make("span", { class: "badge" }) : null);
    const cells = this.columns.map((column, i) => make(i ? "td" : "th",
      { class: column.number ? "number" : null, scope: i ? null : "row", "data-name": column.name },
      texts[i], badges[i] && " ", badges[i]));
    return { element: make("tr", {}, ...cells), texts, badges };
  }
}

function compare(a, b) {
  return a < b ? -1 : Number(a > b);
}

/** Makes these the children; what stays in its place is not touched, so it keeps the focus. */
function put(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  const focused = document.activeElement;
  children.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] || null);
  });
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus();
}
