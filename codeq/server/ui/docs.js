"use strict";

/** An element with attributes and children; texts stay texts. */
function make(tag, attributes = {}, ...children) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  one.append(...children);
  return one;
}

/** The schema behind a reference. */
function found(api, schema) {
  const name = (schema.$ref || "").split("/").pop();
  return name ? api.components.schemas[name] : schema;
}

/** A schema's type in few words. */
function typed(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typed))].join(" or ");
  if (schema.type === "array") return `list of ${typed(schema.items || {})}`;
  return [].concat(schema.type || "any").join(" or ");
}

/** The bounds of a schema in few words. */
function bounds(schema) {
  const said = [];
  if (schema.enum) said.push(schema.enum.map((one) => one || JSON.stringify(one)).join(", "));
  if ("const" in schema) said.push(String(schema.const));
  if ("minimum" in schema) said.push(`at least ${schema.minimum}`);
  if ("maximum" in schema) said.push(`at most ${schema.maximum}`);
  if ("maxItems" in schema) said.push(`at most ${schema.maxItems} items`);
  if ("maxLength" in schema) said.push(`at most ${schema.maxLength} characters`);
  const text = said.join("; ");
  return text && `${text[0].toUpperCase()}${text.slice(1)}.`;
}

function row(name, schema, more, needed) {
  const type = typed(schema) + (needed ? ", required" : "");
  const said = [schema.description || more, bounds(schema)].filter(Boolean).join(" ");
  return make("tr", {}, make("td", {}, make("code", {}, name)),
    make("td", {}, make("span", { class: "quiet" }, type), said && ` — ${said}`));
}

function code(value) {
  return make("pre", {}, JSON.stringify(value, null, 2));
}

/** The members of each object a schema may be. */
function members(api, schema) {
  return (schema.anyOf || [schema]).flatMap((one) => {
    const target = found(api, one);
    const needed = new Set([...(target.required || []), ...(one.required || [])]);
    const rows = Object.entries(target.properties || {})
      .map(([name, member]) => row(name, member, "", needed.has(name)));
    return rows.length ? [make("table", {}, ...rows)] : [];
  });
}

function parameters(operation) {
  const rows = (operation.parameters || [])
    .map((one) => row(`${one.name} (${one.in})`, one.schema, one.description, one.required));
  return rows.length ? [make("h3", {}, "Parameters"), make("table", {}, ...rows)] : [];
}

function body(api, operation) {
  if (!operation.requestBody) return [];
  const { schema, example } = operation.requestBody.content["application/json"];
  const heading = operation.requestBody.required ? "Body" : "Body, may be left out";
  return [make("h3", {}, heading), ...members(api, schema), code(example)];
}

function answers(api, operation) {
  return Object.entries(operation.responses).flatMap(([status, answer]) => {
    const good = status < "300";
    const heading = make("h3", good ? {} : { class: "bad" }, status);
    const said = make("p", {}, answer.description.replaceAll("`", ""));
    const content = (answer.content || {})["application/json"];
    if (!good || !content) return [heading, said];
    return [heading, said, ...members(api, content.schema), code(content.example)];
  });
}

function fill(api) {
  for (const place of document.querySelectorAll("details")) {
    place.addEventListener("toggle", () => {
      const operation = api.paths[place.dataset.path][place.dataset.method];
      place.append(...parameters(operation), ...body(api, operation), ...answers(api, operation));
    }, { once: true });
    if (decodeURIComponent(location.hash) === `#${place.id}`) place.open = true;
  }
}

/** Shows the routes whose path, summary, class of token or statuses hold the words. */
function search(api) {
  const label = document.getElementById("search");
  label.hidden = false;
  label.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const place of document.querySelectorAll("details")) {
      const operation = api.paths[place.dataset.path][place.dataset.method];
      const statuses = Object.keys(operation.responses).join(" ");
      const summary = place.querySelector("summary").textContent;
      const text = `${summary} ${operation.description} ${statuses}`;
      place.hidden = !words.every((word) => text.toLowerCase().includes(word));
    }
  });
}

fetch("/openapi.json")
  .then((answer) => answer.json())
  .then((api) => { fill(api); search(api); });
