// Steer a training loop with nothing but HTTP: JSON, two requests (docs/wire.md). Needs Node.js 18 or newer.
//
//     FLYBALL_SERVER=http://127.0.0.1:1788 node examples/plain_http.mjs --run by-hand --steps 200
//
// The loop fits a line by gradient descent, with a learning rate that begins far too high. Only `post` knows of Flyball.
const option = (name, otherwise) => (process.argv.includes(name) ? process.argv[process.argv.indexOf(name) + 1] : otherwise);
const server = process.env.FLYBALL_SERVER ?? "http://127.0.0.1:1788", token = process.env.FLYBALL_TOKEN;
const run = option("--run", `plain-http-${Date.now()}`), steps = Number(option("--steps", 200));
const session = crypto.randomUUID(), headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };

async function post(path, body) {
  const answer = await fetch(server + path, { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(2000) });
  if (answer.ok) return answer.json();
  throw new Error(`${answer.status} ${(await answer.json()).detail}`);
}

const groups = [{ name: "default", lr: 1.9 }], policy = { type: "windowed", window_size: 5, cooldown_steps: 2 };
const attached = await post("/v1/attach", { run, session, groups, policy, lag: 0 }); // a refusal ends the job here, before training
let lr = groups[0].lr, decided = -1, waiting = [], receipts = [], number = 0, used = null;
let [w, b] = [0, 0], first = null, loss = null;
for (let step = 0; step < steps; step++) {
  const xs = Array.from({ length: 8 }, (_, i) => Math.sin(step * 8 + i)), errors = xs.map((x) => w * x + b - (3 * x - 1));
  loss = errors.reduce((sum, e) => sum + e * e, 0) / 8;
  w -= (lr * 2 * errors.reduce((sum, e, i) => sum + e * xs[i], 0)) / 8;
  b -= (lr * 2 * errors.reduce((sum, e) => sum + e, 0)) / 8;
  first ??= loss;
  if (lr !== used) receipts.push({ number: ++number, step, decided, lr: [lr] }); // what was really used from this step on
  used = lr;
  waiting.push([step, Number.isFinite(loss) ? loss : String(loss)]); // JSON has no NaN: "NaN", "Infinity"
  const report = { session, attempt: attached.attempt, receipts, step: waiting.map((one) => one[0]), signals: { loss: waiting.map((one) => one[1]) } };
  try {
    const { changes, through, receipts_through } = await post(`/v1/runs/${run}/report`, { ...report, end: step === steps - 1 ? "finished" : "" });
    [waiting, receipts] = [waiting.filter((one) => one[0] > through), receipts.filter((one) => one.number > receipts_through)];
    if (changes.decided.length) [lr, decided] = [changes.lr.at(-1)[0], changes.decided.at(-1)]; // the newest holds
  } catch (error) {
    console.error(`step ${step}: ${error.message}; training goes on`); // what waits is sent again with the next step
  }
}
console.log(JSON.stringify({ run, steps, first_loss: first, last_loss: loss, lr, undelivered: waiting.length }));
