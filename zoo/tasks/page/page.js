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

const model = unpacked("model");
const PROVIDERS = { webgpu: "WebGPU", wasm: "WebAssembly" };

/** The runtime and a session of the model on WebGPU or WebAssembly. */
async function session(provider) {
  const [engine, binary] = await Promise.all(["engine", "binary"].map((part) => unpacked(`${provider}-${part}`)));
  const address = URL.createObjectURL(new Blob([engine], { type: "text/javascript" }));
  const ort = await import(address);
  URL.revokeObjectURL(address);
  ort.env.wasm.numThreads = 1; // more need headers that a file cannot have
  ort.env.wasm.wasmBinary = binary;
  ort.env.logLevel = "error";
  const options = { executionProviders: [provider], logSeverityLevel: 3 };
  const lost = provider === "webgpu" ? failure() : new Promise(() => {});
  return { ort, provider, lost, session: await Promise.race([lost, ort.InferenceSession.create(await model, options)]) };
}

/** A promise that is rejected where the runtime fails without telling its caller, as when the GPU is lost. */
function failure() {
  const lost = new Promise((_, fail) =>
    addEventListener("unhandledrejection", (event) => {
      event.preventDefault();
      fail(event.reason);
    }),
  );
  lost.catch(() => {});
  return lost;
}

/** A session on WebGPU if the page can use it and the browser has an adapter, else on WebAssembly. */
async function started() {
  if (config.providers.includes("webgpu")) {
    try {
      if (await navigator.gpu?.requestAdapter()) return await session("webgpu");
    } catch {
      // WebAssembly runs everywhere
    }
  }
  return session("wasm");
}

/** The outputs for an input. A session on WebGPU that fails gives way to one on WebAssembly for good. */
async function outputsOf(input) {
  const current = engine, loaded = await current;
  try {
    return await Promise.race([loaded.lost, task.run(loaded, input)]);
  } catch (error) {
    if (loaded.provider === "wasm") throw error;
    if (engine === current) engine = session("wasm");
    return outputsOf(input);
  }
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

/** Shows an image, at most so many pixels on its longer side; how many of these an image's pixel takes. */
function show(canvas, most) {
  const shown = find("shown"), zoom = most / Math.max(canvas.width, canvas.height);
  const scale = Math.min(1, zoom * Math.min(2, window.devicePixelRatio || 1));
  shown.width = Math.max(1, Math.round(canvas.width * scale));
  shown.height = Math.max(1, Math.round(canvas.height * scale));
  shown.style.width = `${Math.max(1, canvas.width * zoom)}px`;
  shown.classList.toggle("small", zoom > 2);
  const context = shown.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, 0, 0, shown.width, shown.height);
  return shown.width / canvas.width;
}

/** What tasks on images share. */
const images = {
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
};

const tasks = {
  classify: {
    ...images,
    show({ logits }, canvas) {
      show(canvas, 224);
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
  },
  detect: {
    ...images,
    show({ logits, boxes }, canvas) {
      const found = objects(logits, boxes, canvas);
      const list = made("ol"), field = made("label", "field"), slider = made("input"), told = made("span", "share");
      slider.type = "range";
      [slider.min, slider.max, slider.step, slider.value] = [0.05, 0.95, 0.05, this.least];
      field.append(made("span", "", "Least score"), slider, told);
      const redraw = () => {
        this.least = Number(slider.value);
        told.textContent = `${Math.round(100 * this.least)} %`;
        const kept = found.filter(({ score }) => score >= this.least);
        showBoxes(kept, canvas);
        const rows = config.labels.map((label, index) => [label, kept.filter((each) => each.index === index)]);
        list.replaceChildren(
          ...rows.filter(([, each]) => each.length).map(([label, each]) => {
            const row = made("li"), colour = made("span", "dot");
            colour.style.background = colourOf(each[0].index);
            const name = made("span", "label", label);
            name.prepend(colour);
            row.append(name, made("span", "share", `${each.length} ×`));
            return row;
          }),
        );
        if (!kept.length) list.append(made("li", "quiet", "No object has this score."));
      };
      slider.addEventListener("input", redraw);
      redraw();
      find("answers").replaceChildren(field, list);
      return { found, logits: Array.from(logits.data), boxes: Array.from(boxes.data) };
    },
    least: 0.5,
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

let engine = started();
engine.then(
  () => asked || say("Ready.", "ready"),
  (error) => say(`The model cannot run in this browser: ${error.message ?? error}`, "failed"),
);

/** Reads an input and shows the answer; only the newest input is shown. */
async function answer(read) {
  const turn = ++asked;
  try {
    await engine;
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
    const outputs = await outputsOf(input);
    const milliseconds = performance.now() - start, { provider } = await engine;
    if (turn !== asked) return;
    const detail = task.show(outputs, input);
    find("result").hidden = false;
    const duration = milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds);
    say(`Answered in ${duration} ms by ${PROVIDERS[provider]}.`, "answered");
    document.body.dataset.provider = provider;
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
