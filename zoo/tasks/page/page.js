"use strict";

const find = (name) => document.getElementById(name);
const config = JSON.parse(find("config").textContent);
const MOST_PIXELS = 25e6; // a larger image is made smaller before the model sees it
let asked = 0;

function made(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

function say(text, state) {
  find("status").textContent = text;
  document.body.dataset.state = state;
}

/** The bytes of an embedded file, which is compressed by gzip and written in base64. */
async function unpacked(name) {
  const text = atob(find(name).textContent);
  find(name).remove();
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function started() {
  const [engine, binary, model] = await Promise.all(["engine", "binary", "model"].map(unpacked));
  const address = URL.createObjectURL(new Blob([engine], { type: "text/javascript" }));
  const ort = await import(address);
  URL.revokeObjectURL(address);
  ort.env.wasm.numThreads = 1; // more need headers that a file cannot have
  ort.env.wasm.wasmBinary = binary;
  ort.env.logLevel = "error";
  return { ort, session: await ort.InferenceSession.create(model, { executionProviders: ["wasm"] }) };
}

/** The pixels of an image on white, at its own size where that is allowed. */
function drawn(source, width, height) {
  const share = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * share));
  canvas.height = Math.max(1, Math.round(height * share));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function show(canvas) {
  const shown = find("shown"), most = 224, zoom = most / Math.max(canvas.width, canvas.height);
  const density = Math.min(2, window.devicePixelRatio || 1), scale = zoom > 1 ? 1 : zoom * density;
  shown.width = Math.max(1, Math.round(canvas.width * Math.min(1, scale)));
  shown.height = Math.max(1, Math.round(canvas.height * Math.min(1, scale)));
  shown.style.width = `${Math.max(1, canvas.width * zoom)}px`;
  shown.classList.toggle("small", zoom > 2);
  const context = shown.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, 0, 0, shown.width, shown.height);
}

/** The sample rate that a file states in its header; 48 kHz for formats that state none, such as Opus. */
function rateOf(bytes) {
  const view = new DataView(bytes), size = bytes.byteLength;
  const tag = (place) => (place + 4 > size ? "" : String.fromCharCode(...new Uint8Array(bytes, place, 4)));
  if (tag(0) === "fLaC" && size > 21) return view.getUint32(18) >>> 12;
  if (tag(0) === "RIFF") {
    for (let place = 12; place + 16 <= size; place += 8 + view.getUint32(place + 4, true)) {
      if (tag(place) === "fmt ") return view.getUint32(place + 12, true);
    }
  }
  let place = 0;
  if (tag(0).startsWith("ID3") && size > 10) {
    place = 10 + [6, 7, 8, 9].reduce((sum, index) => sum * 128 + view.getUint8(index), 0);
  }
  if (place + 4 <= size && view.getUint16(place) >>> 5 === 0x7ff) { // a frame of MPEG audio
    const version = (view.getUint8(place + 1) >> 3) & 3, index = (view.getUint8(place + 2) >> 2) & 3;
    if (index < 3) return [44100, 48000, 32000][index] / { 0: 4, 1: 1, 2: 2, 3: 1 }[version];
  }
  return 48000;
}

/** The mean of the channels at the model's rate; decoding is at the file's own, so that the browser resamples nothing. */
async function heard(bytes) {
  const stated = rateOf(bytes), rate = stated >= 3000 && stated <= 768000 ? stated : 48000;
  const sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  const mean = new Float32Array(sound.length);
  for (let index = 0; index < sound.numberOfChannels; index++) {
    sound.getChannelData(index).forEach((each, place) => (mean[place] += each / sound.numberOfChannels));
  }
  return resampled(mean, sound.sampleRate, config.rate);
}

/** Band-limited interpolation: a sinc at 0.99 of the lower rate under a Hann window of six zeros on each side. */
function resampled(samples, from, to) {
  if (from === to) return samples;
  let divisor = from;
  for (let rest = to; rest; ) [divisor, rest] = [rest, divisor % rest];
  const old = from / divisor, fresh = to / divisor, base = 0.99 * Math.min(1, to / from), reach = Math.ceil(6 / base);
  const kernels = Array.from({ length: fresh }, (_, phase) => {
    const centre = (phase * old) / fresh, first = Math.floor(centre) - reach;
    const weights = Float64Array.from({ length: 2 * reach + 2 }, (_, index) => {
      const x = (first + index - centre) * base, turn = Math.PI * x;
      if (Math.abs(x) >= 6) return 0;
      return base * Math.cos(turn / 12) ** 2 * (x === 0 ? 1 : Math.sin(turn) / turn);
    });
    return { first, weights };
  });
  return Float32Array.from({ length: Math.ceil((samples.length * fresh) / old) }, (_, place) => {
    const { first, weights } = kernels[place % fresh], start = Math.floor(place / fresh) * old + first;
    return weights.reduce((sum, weight, index) => sum + weight * (samples[start + index] ?? 0), 0);
  });
}

/** Parts that are not too long, each cut in the middle of the quietest 20 ms of its last third, and their starts. */
function* parts(samples) {
  const most = Math.floor(config.longest * config.rate), step = Math.max(1, Math.floor(config.rate / 50));
  let start = 0;
  for (; samples.length - start > most; ) {
    const zone = start + most - Math.floor(most / 3);
    let best = Infinity, end = 0;
    for (let place = zone; place + step <= start + most; place += step) {
      const energy = samples.subarray(place, place + step).reduce((sum, each) => sum + each * each, 0);
      if (energy < best) [best, end] = [energy, place + Math.floor(step / 2)];
    }
    yield [start, samples.slice(start, end)];
    start = end;
  }
  yield [start, samples.slice(start)];
}

/** The words of the likeliest tokens, repeats and blanks left out, and where each begins, in seconds. */
function spelled({ logits, lengths }, start) {
  const size = config.pieces.length + 1, words = [];
  let last = size - 1, open = false;
  for (let place = 0; place < Number(lengths.data[0]); place++) {
    const row = logits.data.subarray(place * size, (place + 1) * size);
    const token = row.indexOf(row.reduce((most, each) => Math.max(most, each)));
    if (token !== last && token !== size - 1) {
      for (const letter of config.pieces[token]) {
        if (letter.trim() === "") open = false;
        else if (open) words.at(-1).word += letter;
        else open = words.push({ word: letter, time: start + place * config.step }) > 0;
      }
    }
    last = token;
  }
  return words;
}

function showWave(samples) {
  const shown = find("shown"), width = (shown.width = 600), height = (shown.height = 120), bar = 2;
  const context = shown.getContext("2d");
  context.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  const peak = (part) => part.reduce((most, each) => Math.max(most, Math.abs(each)), 1e-4);
  const loudest = peak(samples);
  for (let place = 0; place < width; place += bar) {
    const first = Math.floor((place * samples.length) / width);
    const part = samples.subarray(first, Math.max(first + 1, Math.floor(((place + bar) * samples.length) / width)));
    const tall = Math.max(1, (height * peak(part)) / loudest);
    context.fillRect(place, (height - tall) / 2, bar, tall);
  }
}

const tasks = {
  classify: {
    wrong: "This file is not an image that the browser can read.",
    async read(blob) {
      const options = { colorSpaceConversion: "none", imageOrientation: "from-image" };
      const bitmap = await createImageBitmap(blob, options);
      return drawn(bitmap, bitmap.width, bitmap.height);
    },
    async run({ ort, session }, canvas) {
      const { width, height } = canvas;
      const { data } = canvas.getContext("2d").getImageData(0, 0, width, height, { colorSpace: "srgb" });
      const pixels = new ort.Tensor("uint8", new Uint8Array(data.buffer), [height, width, 4]);
      return session.run({ pixels });
    },
    show({ logits }, canvas) {
      show(canvas);
      const largest = Math.max(...logits.data);
      const powers = Array.from(logits.data, (each) => Math.exp(each - largest));
      const total = powers.reduce((sum, each) => sum + each, 0);
      const best = powers.map((each, index) => [each / total, index]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
      const list = made("ol");
      for (const [share, index] of best.slice(0, config.top)) {
        const row = made("li"), track = made("div", "track"), bar = made("div", "bar");
        bar.style.width = `${100 * share}%`;
        track.append(bar);
        row.append(made("span", "label", config.labels[index]));
        row.append(made("span", "share", `${(100 * share).toFixed(1)} %`), track);
        list.append(row);
      }
      find("answers").replaceChildren(list);
      return { index: best[0][1], logits: Array.from(logits.data) };
    },
    async begin() {
      const video = find("video");
      const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      video.srcObject = stream;
      video.hidden = false;
      await video.play();
      return {
        take: async () => drawn(video, video.videoWidth, video.videoHeight),
        end() {
          stream.getTracks().forEach((track) => track.stop());
          video.srcObject = null;
          video.hidden = true;
        },
      };
    },
    labels: ["Use the camera", "Take the picture"],
    missing: "The camera cannot be used: allow it for this page, or choose a file.",
  },
  transcribe: {
    wrong: "This file is not audio that the browser can read, or it is shorter than a tenth of a second.",
    async read(blob) {
      const samples = await heard(await blob.arrayBuffer());
      if (samples.length < config.rate / 10) throw new Error("too short");
      return samples;
    },
    async run({ ort, session }, samples) {
      const words = [];
      let logits = [];
      for (const [start, part] of parts(samples)) {
        const loudest = part.reduce((most, each) => Math.max(most, each), -Infinity);
        const lowest = part.reduce((least, each) => Math.min(least, each), Infinity);
        if (loudest - lowest <= config.silence || part.length < config.rate / 10) continue;
        const outputs = await session.run({ samples: new ort.Tensor("float32", part, [part.length]) });
        words.push(...spelled(outputs, start / config.rate));
        logits = outputs.logits;
      }
      return { words, logits };
    },
    show({ words, logits }, samples) {
      showWave(samples);
      const text = made("p", "words");
      for (const { word, time } of words) {
        const span = made("span", "", word);
        span.append(made("small", "", `${time.toFixed(2)} s`));
        text.append(span);
      }
      if (!words.length) text.append(made("span", "quiet", "No words were heard."));
      find("answers").replaceChildren(text);
      return { text: words.map(({ word }) => word).join(" "), words, logits: Array.from(logits.data ?? []) };
    },
    async begin() {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      const recorder = new MediaRecorder(stream), pieces = [];
      recorder.ondataavailable = ({ data }) => pieces.push(data);
      const stopped = new Promise((done) => (recorder.onstop = done));
      recorder.start();
      say("Listening …", "working");
      const end = () => {
        if (recorder.state !== "inactive") recorder.stop();
        stream.getTracks().forEach((track) => track.stop());
      };
      return {
        async take() {
          end();
          await stopped;
          return task.read(new Blob(pieces, { type: recorder.mimeType }));
        },
        end,
      };
    },
    labels: ["Use the microphone", "Stop and read"],
    missing: "The microphone cannot be used: allow it for this page, or choose a file.",
  },
};
const task = tasks[config.task];

const engine = started();
engine.then(
  () => asked || say("Ready.", "ready"),
  (error) => say(`The model cannot run in this browser: ${error.message ?? error}`, "failed"),
);

/** Reads an input and shows the answer; only the newest input is shown. */
async function answer(read) {
  const turn = ++asked;
  let loaded;
  try {
    loaded = await engine;
  } catch {
    return; // already said
  }
  say("Working …", "working");
  let input;
  try {
    input = await read();
  } catch {
    if (turn === asked) say(task.wrong, "failed");
    return;
  }
  await new Promise((done) => setTimeout(done)); // lets the page show that it works
  if (turn !== asked) return;
  try {
    const start = performance.now();
    const outputs = await task.run(loaded, input);
    const milliseconds = performance.now() - start;
    if (turn !== asked) return;
    const detail = task.show(outputs, input);
    find("result").hidden = false;
    say(`Answered in ${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms.`, "answered");
    document.dispatchEvent(new CustomEvent("answer", { detail }));
  } catch (error) {
    if (turn === asked) say(`The model failed on this input: ${error.message ?? error}`, "failed");
  }
}

const open = (blob) => answer(() => task.read(blob));

find("choose").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", ({ target }) => {
  if (target.files.length) open(target.files[0]);
  target.value = "";
});
addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && open(clipboardData.files[0]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || document.body.classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
});

let live = null;
function rest() {
  live?.end();
  live = null;
  find("live").textContent = task.labels[0];
  find("stop").hidden = true;
}
find("live").addEventListener("click", async () => {
  if (live) {
    const taken = await live.take();
    rest();
    return answer(async () => taken);
  }
  find("live").disabled = true;
  try {
    live = await task.begin();
    find("live").textContent = task.labels[1];
    find("stop").hidden = false;
  } catch {
    say(task.missing, "failed");
  }
  find("live").disabled = false;
});
find("stop").addEventListener("click", rest);
