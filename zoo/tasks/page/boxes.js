// From a detector's output to boxes on an image.

/** The best 100 pairs of a query and a class, and their boxes in pixels of the image: left, top, right, bottom. */
function objects(logits, boxes, { width, height }) {
  const size = logits.dims[2], classes = config.labels.length, found = [];
  for (let query = 0; query < logits.dims[1]; query++) {
    const row = logits.data.subarray(query * size, (query + 1) * size);
    const largest = row.reduce((most, each) => Math.max(most, each));
    const total = row.reduce((sum, each) => sum + Math.exp(each - largest), 0); // one class more means no object
    const [x, y, wide, tall] = boxes.data.subarray(query * 4, query * 4 + 4);
    const within = (value, most) => Math.min(most, Math.max(0, value * most));
    const box = [within(x - wide / 2, width), within(y - tall / 2, height)];
    box.push(within(x + wide / 2, width), within(y + tall / 2, height));
    for (let index = 0; index < classes; index++) {
      const score = size > classes ? Math.exp(row[index] - largest) / total : 1 / (1 + Math.exp(-row[index]));
      found.push({ index, label: config.labels[index], score, box });
    }
  }
  return found.sort((a, b) => b.score - a.score).slice(0, 100);
}

/** A colour of a class; classes that follow each other are far apart. */
function colourOf(index) {
  return `hsl(${(210 + index * 137.5) % 360} 75% 48%)`;
}

function showBoxes(found, canvas) {
  const scale = show(canvas, 672), context = find("shown").getContext("2d"), width = find("shown").width;
  const unit = Math.max(1, width / 448);
  context.font = `600 ${12 * unit}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { index, label, score, box } of found.toReversed()) {
    const [left, top, right, bottom] = box.map((each) => each * scale), text = `${label} ${Math.round(100 * score)} %`;
    context.strokeStyle = context.fillStyle = colourOf(index);
    context.lineWidth = 2 * unit;
    context.strokeRect(left, top, right - left, bottom - top);
    const wide = context.measureText(text).width + 6 * unit, tall = 16 * unit;
    const place = Math.max(0, Math.min(left, width - wide)), above = top >= tall ? top - tall : top;
    context.fillRect(place, above, wide, tall);
    context.fillStyle = "white";
    context.fillText(text, place + 3 * unit, above + 2 * unit);
  }
}
