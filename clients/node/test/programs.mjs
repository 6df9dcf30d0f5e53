/** Small programs that use the client, run to their end: how a process ends can't be seen from inside. */

import { spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { text } from "node:stream/consumers";

const HERE = new URL("..", import.meta.url).pathname; // in it the package's own name leads to it
/** Milliseconds after which a program that should have ended is killed: far more than any takes. */
const DEADLINE_MS = 20_000;
const PREAMBLE = `import http from "node:http";
import { createServer } from "node:net";
import { Client, lease, listen, releaseOnSignal, resolve, watch } from "portd-client";
`;

/** Start a program; `ended` gives its status, its signal and what it wrote. */
export function start(source) {
  const child = spawn(process.execPath, ["--input-type=module", "-e", PREAMBLE + source], {
    cwd: HERE, timeout: DEADLINE_MS, killSignal: "SIGKILL",
  });
  const written = Promise.all([text(child.stdout), text(child.stderr)]);
  child.ended = once(child, "exit").then(async ([status, signal]) => {
    const [output, errors] = await written;
    return { status, signal, output: output.trim(), errors };
  });
  return child;
}

/** Run a program to its end. */
export function run(source) {
  return start(source).ended;
}

/** Return the next line that a program writes. */
export async function firstLine(child) {
  for await (const line of createInterface({ input: child.stdout })) return line;
  throw new Error(`it wrote no line: ${(await child.ended).errors}`);
}
