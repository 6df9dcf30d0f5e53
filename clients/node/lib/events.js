/** Server-sent events (WHATWG HTML, section 9.2.6) out of a stream of bytes. */

import { ProtocolError } from "./errors.js";

/** The longest event that is gathered, in characters: portd's own are about 1 KB. */
const EVENT_MAX_CHARS = 1024 * 1024;

/** Iterate over a byte stream's events as `{name, revision, data}`, decoded; comments vanish. */
export async function* serverSentEvents(stream) {
  const decoder = new TextDecoder();
  let rest = "";
  let id = "";
  for await (const part of stream) {
    const blocks = (rest + decoder.decode(part, { stream: true })).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    if (rest.length > EVENT_MAX_CHARS) throw new ProtocolError("an event that does not end");
    for (const block of blocks) {
      const event = parsed(block, id);
      id = event.id;
      if (event.data !== null) yield decoded(event);
    }
  }
}

function decoded({ name, data, id }) {
  if (!/^\d+$/.test(id)) throw new ProtocolError(`an event with the id ${JSON.stringify(id)}, which is no revision`);
  try {
    return { name, revision: Number(id), data: JSON.parse(data) };
  } catch (error) {
    throw new ProtocolError(`an event that is not JSON: ${error.message}`);
  }
}

function parsed(block, id) {
  const event = { name: "message", data: null, id };
  for (const line of block.split("\n")) {
    const [, field, value = ""] = /^([^:]*)(?:: ?(.*))?$/.exec(line);
    if (field === "data") event.data = event.data === null ? value : `${event.data}\n${value}`;
    else if (field === "event") event.name = value;
    else if (field === "id") event.id = value;
  }
  return event;
}
