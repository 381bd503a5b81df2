// The WebSocket to the viewer: connects again by itself, hands on what comes, and sends commands.

import { askForToken, tokenQuery } from "./token.js";
import { decode } from "./wire.js";

const FIRST_PAUSE_MS = 300;
const LONGEST_PAUSE_MS = 5000;
const TOKEN_NEEDED = 4401; // code with which the viewer closes

export class Link {
  /**
   * @param {object} handlers by kind of message; `open` and `closed` tell of the connection.
   */
  constructor(handlers) {
    this.handlers = handlers;
    this.socket = null;
    this.pauseMs = FIRST_PAUSE_MS;
    this.nextId = 1;
    this.waiting = new Map();
    this.shown = 0;
    document.addEventListener("visibilitychange", () => this.acknowledge());
    window.addEventListener("online", () => this.connect());
    this.connect();
  }

  connect() {
    if (this.socket) return;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/ws?${tokenQuery()}`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.order = Promise.resolve();
    socket.onopen = () => {
      this.pauseMs = FIRST_PAUSE_MS;
      this.handlers.open();
    };
    socket.onmessage = (event) => this.receive(socket, event.data);
    socket.onclose = (event) => this.lost(event);
  }

  lost(event) {
    this.socket = null;
    this.shown = 0;
    for (const { reject } of this.waiting.values()) {
      reject(new Error("the connection was lost before an answer came: look whether it was done"));
    }
    this.waiting.clear();
    this.handlers.closed(event.reason);
    if (event.code === TOKEN_NEEDED) {
      askForToken().then((isGiven) => { if (isGiven) this.connect(); });
      return;
    }
    setTimeout(() => this.connect(), this.pauseMs * (0.75 + Math.random() / 2));
    this.pauseMs = Math.min(2 * this.pauseMs, LONGEST_PAUSE_MS);
  }

  receive(socket, data) {
    // Inflating takes turns of its own: this keeps messages in their order.
    this.order = this.order.then(async () => {
      if (socket.readyState !== WebSocket.OPEN) return;
      if (typeof data === "string") {
        this.dispatch(JSON.parse(data), null);
        return;
      }
      const { head, bytes } = await decode(data);
      if (socket.readyState !== WebSocket.OPEN) return;
      this.dispatch(head, bytes);
      this.shown = head.seq;
      this.acknowledge();
    }).catch((error) => {
      // What later messages build on is lacking: begin anew, and not at once if it comes again.
      console.error(error);
      this.pauseMs = LONGEST_PAUSE_MS;
      socket.close();
    });
  }

  /** Say what was shown; a page that nobody looks at says nothing, and is sent nothing more. */
  acknowledge() {
    if (this.shown && !document.hidden) this.send({ type: "ack", seq: this.shown });
  }

  dispatch(head, bytes) {
    if (head.type === "reply") {
      const waiting = this.waiting.get(head.id);
      this.waiting.delete(head.id);
      if (!waiting) return;
      if (head.ok) waiting.resolve(head.result);
      else waiting.reject(Object.assign(new Error(head.error.message), head.error));
      return;
    }
    this.handlers[head.type]?.(head, bytes);
  }

  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  /** Have the daemon do something; the result, or an error with a `code` and words. */
  command(command, args = {}) {
    return new Promise((resolve, reject) => {
      const id = this.nextId++;
      if (!this.send({ type: "command", id, command, arguments: args })) {
        reject(new Error("not connected just now: try again in a moment"));
        return;
      }
      this.waiting.set(id, { resolve, reject });
    });
  }
}
