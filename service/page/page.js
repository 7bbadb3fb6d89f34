// @ts-check
// Owns what the page does: sends one request, shows its streamed answer, and tells how the service is.
// What comes from the service reaches the page as text nodes only; nothing is stored, the key lives in its field alone.

const EXAMPLE = "What is mini-llm?";
const POLL_MS = 2000;
const LONGEST_POLL_MS = 30_000;
const LONGEST_SPOKEN = 600; // characters of an answer that is read aloud as a whole
const ENDS = { stop: "the model (stop)", length: "max tokens (length)", cancelled: "a time limit (cancelled)" };

/** @template {Element} T @param {string} id @param {new () => T} kind @returns {T} */
function find(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new TypeError(`the page has no ${kind.name} #${id}`);
  return found;
}

const form = find("form", HTMLFormElement);
const [prompt, system] = ["prompt", "system"].map((id) => find(id, HTMLTextAreaElement));
const numbers = ["max_tokens", "temperature", "top_p", "top_k"].map((id) => find(id, HTMLInputElement));
const key = find("key", HTMLInputElement);
const [send, stop, example] = ["send", "stop", "example"].map((id) => find(id, HTMLButtonElement));
const copyAnswer = find("copy-answer", HTMLButtonElement);
const [answer, facts, state, load] = ["answer", "facts", "state", "load"].map((id) => find(id, HTMLElement));
const answerText = new Text(); // grows while the answer streams

let keysRequired = false;
/** @type {AbortController | null} */
let running = null;

/** @param {string} id @param {string} text */
const show = (id, text) => void (find(id, HTMLElement).textContent = text);

/** @param {number} perSecond */
const rate = (perSecond) => perSecond.toFixed(perSecond < 100 ? 1 : 0);
/** @param {number} ms */
const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
/** One of the service's paths, also where a proxy has moved the page. @param {string} path */
const address = (path) => new URL(path, location.origin + location.pathname).href;

/** Without credentials no browser opens its login dialog at a 401. @param {string} path @param {RequestInit} options */
const call = (path, options) => fetch(address(path), { cache: "no-store", credentials: "omit", ...options });

/** Shows these figures of a list, hides its others. @param {HTMLElement} list @param {Record<string, any>} figures */
function showFigures(list, figures) {
  list.hidden = Object.keys(figures).length === 0;
  for (const place of list.querySelectorAll("dd")) {
    const value = figures[place.id.slice(list.id.length + 1)];
    place.textContent = value ?? "";
    /** @type {HTMLElement} */ (place.parentElement).hidden = value === undefined;
  }
}

// The request, and the same one as programs ---------------------------------------------------------------------------

/** @param {string} text */
function buildRequest(text) {
  /** @type {Record<string, string | number | boolean>} */
  const request = { prompt: text };
  if (system.value) request.system = system.value;
  for (const field of numbers) if (field.value) request[field.name] = field.valueAsNumber;
  return { ...request, stream: true };
}

/** @param {string} text */
const quoteForShell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** @param {object} request @param {boolean} withKey */
function writeCurl(request, withKey) {
  const lines = [`curl -sSN ${quoteForShell(address("generate"))}`, `-H 'Content-Type: application/json'`];
  if (withKey) lines.push(`-H "Authorization: Bearer $LLM_KEY"`);
  return [...lines, `-d ${quoteForShell(JSON.stringify(request))}`].join(" \\\n  ");
}

/** JSON's strings and numbers mean the same in Python. @param {object} request @param {boolean} withKey */
function writePython(request, withKey) {
  const fields = Object.entries(request).map(
    ([name, value]) => `    "${name}": ${value === true ? "True" : JSON.stringify(value)},`,
  );
  return `import json
${withKey ? "import os\n" : ""}import urllib.error
import urllib.request

url = ${JSON.stringify(address("generate"))}
headers = {"Content-Type": "application/json"}
${withKey ? `headers["Authorization"] = "Bearer " + os.environ["LLM_KEY"]\n` : ""}body = {
${fields.join("\n")}
}
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
try:
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                print(event.get("response", event.get("detail")), end="", flush=True)
except urllib.error.HTTPError as error:
    raise SystemExit(error.read().decode())
print()
`;
}

function showSamples() {
  const [request, withKey] = [buildRequest(prompt.value || EXAMPLE), keysRequired || key.value !== ""];
  show("curl", writeCurl(request, withKey));
  show("python", writePython(request, withKey));
  find("key-shown", HTMLElement).hidden = !withKey;
}

// The answer ----------------------------------------------------------------------------------------------------------

/** A refusal or failure that the service told with a problem document. */
class Refusal extends Error {
  /** @param {any} problem @param {string | null} retryAfter */
  constructor(problem, retryAfter = null) {
    super(problem.detail ?? problem.title ?? `The service answered HTTP ${problem.status}.`);
    this.problem = problem;
    this.retryAfter = retryAfter;
  }
}

/** Server-sent events, as far as the service uses them. @param {ReadableStream<Uint8Array>} body */
async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let [rest, kind] = ["", "message"];
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const lines = (rest + decoder.decode(read.value, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      if (line === "") kind = "message";
      else if (line.startsWith("event: ")) kind = line.slice(7);
      else if (line.startsWith("data: ")) yield { kind, data: JSON.parse(line.slice(6)) };
    }
  }
}

/** Sends the request and shows the pieces that come; gives the last event. @param {AbortSignal} signal */
async function generate(signal) {
  const headers = new Headers({ "Content-Type": "application/json" });
  if (key.value) headers.set("Authorization", `Bearer ${key.value.trim()}`);
  const body = JSON.stringify(buildRequest(prompt.value));
  const response = await call("generate", { method: "POST", headers, body, signal });
  if (!response.ok || !response.body) {
    const problem = await response.json().catch(() => ({}));
    throw new Refusal({ ...problem, status: response.status }, response.headers.get("Retry-After"));
  }
  let [count, firstMs, shownMs] = [0, 0, 0];
  for await (const { kind, data } of readEvents(response.body)) {
    if (kind === "error") throw new Refusal(data);
    if (data.done) return data;
    appendPiece(data.response);
    const nowMs = performance.now();
    if (count === 0) firstMs = nowMs;
    count += 1;
    show("progress", "Answering…");
    copyAnswer.disabled = false;
    if (nowMs - shownMs < 200) continue;
    shownMs = nowMs;
    // Until the service tells its own figures: a piece is a token, or a few.
    const speed = (1000 * (count - 1)) / (nowMs - firstMs);
    showFigures(facts, { speed: count > 4 ? `≈ ${rate(speed)}` : undefined, made: `≈ ${count}` });
  }
  throw new Error("The connection ended before the answer was complete.");
}

/** @param {string} text */
function appendPiece(text) {
  const atEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 8;
  answerText.appendData(text);
  if (atEnd) answer.scrollTop = answer.scrollHeight; // whoever has scrolled back is left in peace
}

/** @param {any} last */
function showEnd({ usage, timings, finish_reason: end }) {
  showFigures(facts, {
    speed: rate(timings.tokens_per_second),
    made: usage.completion_tokens,
    read: usage.prompt_tokens,
    queue: duration(timings.queue_ms),
    total: duration(timings.total_ms),
    end: /** @type {Record<string, string>} */ (ENDS)[end] ?? end,
  });
  show("progress", "Finished");
  // Once and as a whole: an answer that is announced piece by piece cannot be listened to.
  const text = answerText.data.length > LONGEST_SPOKEN ? "" : answerText.data;
  show("spoken", `Finished, ${usage.completion_tokens} tokens. ${text}`);
}

/** @param {unknown} error */
function showError(error) {
  if (!(error instanceof Refusal)) {
    const lost = error instanceof TypeError; // what fetch throws when there is no connection, or no longer
    return refuse(lost ? "The service cannot be reached, or the connection was lost." : String(error), null);
  }
  const { status, id, field } = error.problem;
  if (status === 401) {
    return refuse(key.value ? error.message : "This service needs a key: enter it in the field Key.", key);
  }
  const more = error.retryAfter ? ` (try again in ${error.retryAfter} s)` : status === 500 ? ` (${id})` : "";
  refuse(error.message + more, form.elements.namedItem(field ?? ""));
}

/** Tells what is wrong and leads to the field that can put it right. @param {string} text @param {unknown} field */
function refuse(text, field) {
  show("progress", "");
  show("error", text);
  find("error", HTMLElement).hidden = false;
  if (!(field instanceof HTMLElement)) return;
  field.closest("details")?.setAttribute("open", "");
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

/** @param {boolean} busy */
function setBusy(busy) {
  const focused = document.activeElement;
  send.disabled = busy;
  stop.disabled = !busy;
  answer.setAttribute("aria-busy", String(busy));
  // A disabled button loses the focus, and whoever works by keyboard their place.
  if (busy && focused === send) stop.focus();
  if (!busy && focused === stop) send.focus();
}

async function run() {
  if (running) return;
  find("error", HTMLElement).hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const wrong = numbers.find((field) => field.validity.badInput);
  if (wrong) return refuse(`${wrong.name}: must be a number`, wrong);
  if (!prompt.value) return refuse("Write a prompt first.", prompt);
  if (/[^ -~]/.test(key.value)) return refuse("The key holds characters that no key can have.", key);
  running = new AbortController();
  answerText.data = "";
  copyAnswer.disabled = true;
  showFigures(facts, {});
  setBusy(true);
  show("progress", "Waiting for the first token…");
  show("spoken", "Sent.");
  try {
    showEnd(await generate(running.signal));
  } catch (error) {
    if (!running.signal.aborted) showError(error);
    else for (const id of ["progress", "spoken"]) show(id, "Stopped");
  }
  running = null;
  setBusy(false);
  void poll();
}

// The state of the service --------------------------------------------------------------------------------------------

let [failures, polling, phase] = [0, false, ""];
/** @type {number | undefined} */
let timer;

/** Asks for the state, again and again while the page can be seen, ever more rarely while nobody answers. */
async function poll() {
  clearTimeout(timer);
  if (polling || document.visibilityState !== "visible") return;
  polling = true;
  try {
    const told = await (await call("ready", { signal: AbortSignal.timeout(5000) })).json();
    showState(told);
    // After a load or an absence it may be another model.
    if (phase !== told.status) await readVersion();
    [failures, phase] = [0, told.status];
  } catch {
    [failures, phase] = [failures + 1, ""];
    state.dataset.phase = "away";
    show("phase", "The service cannot be reached");
    showFigures(load, {});
  }
  polling = false;
  timer = setTimeout(poll, Math.min(POLL_MS * 2 ** failures, LONGEST_POLL_MS));
}

/** @param {any} told */
function showState(told) {
  state.dataset.phase = told.status;
  show("phase", told.status.charAt(0).toUpperCase() + told.status.slice(1) + (told.reason ? `: ${told.reason}` : ""));
  showFigures(load, {
    running: told.running,
    waiting: told.waiting,
    wait: told.predicted_wait_s > 0 ? duration(told.predicted_wait_s * 1000) : undefined,
    speed: told.tokens_per_second > 0 ? rate(told.tokens_per_second) : undefined,
  });
}

async function readVersion() {
  const told = await (await call("version", { signal: AbortSignal.timeout(5000) })).json();
  const { version, model } = told;
  show("version", `mini-llm ${version}`);
  if (model) {
    show("model", `${model.name} · ${model.quantization} · context of ${model.context_length} tokens`);
    document.title = `${model.name} · mini-llm`;
    find("starter", HTMLElement).hidden = !model.name.includes("starter");
  }
  keysRequired = told.keys_required === true;
  show("key-need", keysRequired ? " (this service needs one)" : " (this service needs none)");
  if (keysRequired && !key.value) find("key-box", HTMLDetailsElement).open = true;
  showSamples();
}

// What people do ------------------------------------------------------------------------------------------------------

/** @param {HTMLButtonElement} button @param {HTMLElement} source */
function offerCopy(button, source) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent ?? "");
      button.textContent = "Copied";
    } catch {
      // Outside https and localhost a page has no clipboard; what is selected can at least be copied by hand.
      getSelection()?.selectAllChildren(source);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    show("spoken", button.textContent);
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void run();
});
form.addEventListener("input", showSamples);
stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  const stops = event.key === "Escape" && running !== null;
  if (event.isComposing || !(sends || stops)) return;
  event.preventDefault();
  if (sends) void run();
  else running?.abort();
});
document.addEventListener("visibilitychange", poll);
example.addEventListener("click", () => {
  prompt.value = EXAMPLE;
  showSamples();
  void run();
});
offerCopy(copyAnswer, answer);
for (const name of ["curl", "python"]) offerCopy(find(`copy-${name}`, HTMLButtonElement), find(name, HTMLElement));

example.textContent = `Ask it: ${EXAMPLE}`;
prompt.placeholder = EXAMPLE;
answer.append(answerText);
showSamples();
void poll();
