/** REST calls of this server with the person's token. */

const PREFIX = "/v1/codeq";
const WAIT_MS_MAX = 15_000;

/** The server answered with an error; `retryAfterSeconds` is 0 when it named no time. */
export class Refused extends Error {
  constructor(status, message, retryAfterSeconds) {
    super(message);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/** No answer came. */
export class Away extends Error {}

export class Api {
  constructor(token) {
    this.token = token;
  }

  get(path, query = {}) {
    return this.#call("GET", path, query);
  }

  post(path, query = {}, body = {}) {
    return this.#call("POST", path, query, JSON.stringify(body));
  }

  /** The text of an answer, for values that must not be rounded. */
  text(path, query = {}) {
    return this.#call("GET", path, query, undefined, (text) => text);
  }

  async #call(method, path, query, body, read = JSON.parse) {
    const named = Object.entries(query).filter(([, value]) => value !== "" && value != null);
    const search = new URLSearchParams(named);
    const headers = { authorization: `Bearer ${this.token}` };
    if (body) headers["content-type"] = "application/json";
    let answer, text;
    try {
      answer = await fetch(`${PREFIX}${path}${named.length ? `?${search}` : ""}`, {
        method, headers, body, cache: "no-store", signal: AbortSignal.timeout(WAIT_MS_MAX),
      });
      text = await answer.text();
    } catch {
      throw new Away("the server does not answer");
    }
    if (answer.ok) return read(text);
    throw new Refused(answer.status, said(text, answer),
      Number(answer.headers.get("retry-after")) || 0);
  }
}

/** The message of an error; a proxy in between may have said it in its own way. */
function said(text, answer) {
  try {
    return JSON.parse(text).message || answer.statusText;
  } catch {
    return answer.statusText;
  }
}

/** The path of a queue's routes. */
export function queuePath(command, rest) {
  return `/admin/queues/${encodeURIComponent(command)}/${rest}`;
}
