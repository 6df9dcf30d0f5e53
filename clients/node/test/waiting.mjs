/** Waiting for what comes about by itself. */

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";

const DEADLINE_MS = 20_000;
const PAUSE_MS = 5;

/** Ask until the answer is true, and return it; fails at the deadline, and says what was waited for. */
export async function until(condition, what) {
  const end = performance.now() + DEADLINE_MS;
  while (performance.now() < end) {
    const answer = await condition();
    if (answer) return answer;
    await sleep(PAUSE_MS);
  }
  return assert.fail(`not within ${DEADLINE_MS} ms: ${what}`);
}
