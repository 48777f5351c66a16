// The real server, as people start it: a release binary, a port of its own, a folder of its own.

import { spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

const START_MS = 120_000;
/** Longer than the server takes to end what is under way and to write its cache. */
const STOP_MS = 30_000;

export class Server {
  #binary;
  #folder;
  #options = [];
  #process = null;
  port = 0;

  constructor(binary, folder) {
    this.#binary = binary;
    this.#folder = folder;
  }

  static async inNewFolder(binary) {
    return new Server(binary, await mkdtemp(join(tmpdir(), "kvkeep-dashboard-")));
  }

  get url() {
    return `http://127.0.0.1:${this.port}/`;
  }

  /** With `options` beside port and disk. Again as it ran before, if it did. */
  async start(options = this.#options) {
    this.#options = options;
    const settings = ["serve", "--port", String(this.port), "--disk", join(this.#folder, "disk"), ...options];
    const child = spawn(this.#binary, settings, { stdio: ["ignore", "ignore", "pipe"] });
    this.#process = child;
    let said = "";
    await new Promise((listening, failed) => {
      const late = setTimeout(() => failed(new Error(`the server does not listen: ${said}`)), START_MS);
      child.once("exit", (code) => {
        clearTimeout(late);
        failed(new Error(`the server ended with ${code}: ${said}`));
      });
      child.stderr.on("data", (text) => {
        said += text;
        const port = /http:\/\/127\.0\.0\.1:(\d+)/.exec(said)?.[1];
        if (!port) return;
        this.port = Number(port);
        clearTimeout(late);
        listening();
      });
    });
  }

  /** As Ctrl+C does, so that what is in RAM is written; killed if that takes too long. */
  async stop() {
    const child = this.#process;
    if (!child || child.exitCode !== null) return;
    const ended = new Promise((exit) => child.once("exit", exit));
    const late = setTimeout(() => child.kill("SIGKILL"), STOP_MS);
    child.kill("SIGINT");
    await ended;
    clearTimeout(late);
  }

  async end() {
    await this.stop();
    await rm(this.#folder, { recursive: true, force: true });
  }

  async file(name, text) {
    const path = join(this.#folder, name);
    await writeFile(path, text, { mode: 0o600 });
    return path;
  }

  async get(path, key) {
    return this.#json(await fetch(this.url + path, { headers: bearer(key) }));
  }

  async post(path, body, key) {
    const headers = { "Content-Type": "application/json", ...bearer(key) };
    return this.#json(await fetch(this.url + path, { method: "POST", headers, body: JSON.stringify(body) }));
  }

  chat(messages, { key, ...more } = {}) {
    return this.post("v1/chat/completions", { messages, max_tokens: 24, temperature: 0, ...more }, key);
  }

  async #json(response) {
    const body = await response.json();
    if (!response.ok) throw new Error(`${response.url} answers ${response.status}: ${JSON.stringify(body)}`);
    return body;
  }
}

const bearer = (key) => (key ? { Authorization: `Bearer ${key}` } : {});
