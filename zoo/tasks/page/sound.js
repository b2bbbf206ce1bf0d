// From a recording to the samples that a model takes, and from its output to words.

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
