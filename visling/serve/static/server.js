/* The HTTP interface of `visling serve`, as functions. Where a token is needed, a cookie carries it. */

/** What the server, or the way to it, has to say about a request that failed. */
export class ServerError extends Error {
  /** @param status of the reply; 0 if there was none. */
  constructor(text, status) {
    super(text);
    this.status = status;
  }
}

const OFFLINE =
  "The server does not answer. If `visling serve` has ended, start it again; what you entered is still here.";

async function call(path, { body, type, signal } = {}) {
  const headers = type ? { "Content-Type": type } : {};
  let reply;
  try {
    reply = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(OFFLINE, 0);
  }
  let content;
  try {
    content = await reply.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    content = null;
  }
  if (!reply.ok || content === null) {
    throw new ServerError(content?.error ?? `The server replied ${reply.status} without an explanation.`, reply.status);
  }
  return content;
}

const post = (path, content, signal) =>
  call(path, { body: JSON.stringify(content), type: "application/json", signal });

/** The runs that are served. */
export const listModels = () => call("/api/models");

/** Pictures at hand. */
export const listExamples = () => call("/api/examples");

/** Where a picture at hand is, with at most so many pixels on a side. */
export const exampleAddress = (id, side) => `/api/examples/${encodeURIComponent(id)}?side=${side}`;

/** Sends a picture; returns its id, width and height. */
export const sendPicture = (file, signal) =>
  call("/api/images", { body: file, type: file.type || "application/octet-stream", signal });

/** The document of one question: answers, words, boxes, maps. */
export const inspect = (question, signal) => post("/api/inspect", question, signal);

/** Pictures at hand, the one that a caption fits best first. */
export const search = (question, signal) => post("/api/search", question, signal);
