// The gallery: one page with the views #, #LAYER and #LAYER/UNIT, and those of search.js. Its data comes in scripts,
// because a page that is opened from a disk may not read files. Names go through textContent or encodeURIComponent,
// never into markup.
"use strict";

const unitvis = (() => {
  const $ = (id) => document.getElementById(id);
  const layers = new Map();  // name -> entry of the index, with .data once its script has run
  const waiting = new Map();  // name -> what to call once its script has run
  let run, shown = {}, byValue = false;

  // --- elements ---

  function el(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }

  const link = (name, unit) => "#" + encodeURIComponent(name) + (unit === undefined ? "" : "/" + unit);
  const file = (layer, name) => `gallery/layers/${layer.folder}/${name}`;
  const label = (data, unit) => (data.labels ? data.labels[unit] : String(unit));
  const number = (value) => String(Number(Number(value).toPrecision(4)));  // infinite values come as strings
  const noteMark = (note) => (note ? el("em", { title: run.notes[note] }, note) : "");

  /** A tile among so many in a sprite of at most so many columns: those, its rows, and the column and row of the tile. */
  function placed(index, count, most) {
    const columns = Math.min(most, count);
    return { columns, rows: Math.ceil(count / columns), column: index % columns, row: Math.floor(index / columns) };
  }

  /** The file and the place of a unit's tile in a sprite, which holds a block of units. */
  function tileOf(layer, unit, kind) {
    const [columns, rows] = run.sprite, first = unit - (unit % (columns * rows));
    const ending = kind === "responses" || kind === "filters" ? ".png" : ".jpg";
    return { source: file(layer, `${kind}-${first}${ending}`),
      ...placed(unit - first, Math.min(columns * rows, layer.units - first), columns) };
  }

  /** A box in an element, or a part of a picture that fills one: left, top, right, bottom as shares of its size. */
  const at = ([left, top, right, bottom]) =>
    `left:${100 * left}%;top:${100 * top}%;width:${100 * (right - left)}%;height:${100 * (bottom - top)}%`;
  const zoomed = ([left, top, right, bottom]) => at([-left / (right - left), -top / (bottom - top),
    (1 - left) / (right - left), (1 - top) / (bottom - top)]);

  /**
   * One of `columns` x `rows` equal parts of a picture. It is an <img>, because browsers do not print backgrounds, and is
   * not loaded lazily, because they print without what is not there yet; off the screen it is loaded, but not decoded.
   */
  function part(kind, { source, columns, rows, column, row }, alt, more) {
    const box = [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows];
    return el("span", { class: kind, ...more }, el("img", { src: source, style: zoomed(box), decoding: "async", alt }));
  }

  /** The cell of one winner in a sprite. */
  function cell(layer, unit, kind, rank, alt, style) {
    const { source, columns, rows, column, row } = tileOf(layer, unit, kind), down = Math.ceil(run.k / run.across);
    return part("cell", { source, columns: columns * run.across, rows: rows * down,
      column: column * run.across + (rank % run.across), row: row * down + Math.floor(rank / run.across) },
      alt, { title: alt, style });
  }

  /** A tile of a unit's patches, with lines between them. */
  const patches = (place, alt) => part("patches", place, alt,
    { style: `--across:${run.across};--down:${Math.ceil(run.k / run.across)}` });

  // --- the first page ---

  function overview() {
    const rows = run.layers.map((layer) => el("li", {},
      el("h2", {}, el("a", { href: link(layer.name) }, layer.name)),
      el("p", {}, layer.facts),
      el("div", { class: "strip" }, ...layer.strip.map((unit, index) => el("a", { href: link(layer.name, unit) },
        patches({ source: file(layer, "strip.jpg"), ...placed(index, layer.strip.length, run.sprite[0]) },
          `Patches of unit ${unit} of ${layer.name}`))))));
    return [el("h1", {}, run.title), el("p", {}, run.run),
      el("p", {}, "Each square below is one unit: the pieces of images that excite it most, strongest first. " +
        "Layers are in the order in which an image passes through them."),
      el("ol", { class: "layers" }, ...rows)];
  }

  // --- a layer ---

  function order(data) {
    const units = data.winners.map((_, unit) => unit);
    const best = (unit) => (data.winners[unit].length ? data.winners[unit][0][0] : -Infinity);
    return byValue ? units.sort((a, b) => best(b) - best(a) || a - b) : units;
  }

  function tile(layer, unit) {
    const data = layer.data, winner = data.winners[unit][0], note = data.notes[unit];
    const text = `Unit ${label(data, unit)}: ` + (data.fired[unit] ? `its ${data.fired[unit]} strongest patches` : note);
    return el("a", { class: "tile", href: link(layer.name, unit), id: "unit-" + unit },
      patches(tileOf(layer, unit, "patches"), text),
      data.filters ? filter(layer, unit) : "",
      el("b", {}, label(data, unit)), data.names ? el("span", {}, data.names[unit]) : "", noteMark(note),
      el("span", { class: "value", title: "largest response" }, winner && !note.startsWith("dead") ? number(winner[0]) : ""),
      data.classes ? el("span", { class: "classes", title: data.classes[unit] }, data.classes[unit]) : "");
  }

  const filter = (layer, unit) => part("filter", tileOf(layer, unit, "filters"), `Weights of unit ${unit}`,
    { title: "the unit's weights; grey is 0" });

  function layerPage(layer) {
    const data = layer.data;
    const sort = (value, text) => el("label", {}, el("input", { type: "radio", name: "sort", value,
      checked: (value === "value") === byValue ? "" : null,
      onchange: () => { byValue = value === "value"; draw(); $("view").querySelector("input:checked").focus(); } }), text);
    return [el("h1", {}, layer.name), el("p", {}, layer.facts),
      el("details", { open: matchMedia("(min-width: 40rem)").matches ? "" : null }, el("summary", {}, "What is this?"),
        el("dl", { class: "answers" }, ...data.answers.map(([question, answer]) =>
          el("div", {}, el("dt", {}, question), el("dd", {}, answer))))),
      el("fieldset", {}, el("legend", {}, "Units by"), sort("number", "number"), sort("value", "largest response")),
      el("div", { class: "grid" }, ...order(data).map((unit) => tile(layer, unit)))];
  }

  // --- a unit ---

  const INSET = 12;  // a box that is so many times smaller than the image is shown enlarged as well, at least twice as large
  const clamped = (share) => Math.min(1, Math.max(0, share));
  const shares = ([left, top, right, bottom], [width, height]) => [left / width, top / height, right / width, bottom / height];
  const frame = (kind, box) => el("span", { class: "frame " + kind, style: at(box.map(clamped)) });
  const photo = (image, alt, style) => el("img", { src: `gallery/images/${image}.jpg`, alt, style });

  function scene(data, image, alt, ...over) {
    return el("span", { class: "scene", style: `--ratio:${data.input[0]}/${data.input[1]}` }, photo(image, alt), ...over);
  }

  /** The square about a box, in pixels of the input, that is `times` as wide as its longer side. */
  function square([left, top, right, bottom], times) {
    const half = (times * Math.max(right - left, bottom - top, 1)) / 2, x = (left + right) / 2, y = (top + bottom) / 2;
    return [x - half, y - half, x + half, y + half];
  }

  /** A piece of a whole image, grey outside of it; within: the box, in pixels, that the element around it shows. */
  function piece(data, image, box, within, alt) {
    const [width, height] = [within[2] - within[0], within[3] - within[1]];
    const [left, top, right, bottom] = shares(box, data.input);
    return el("span", { class: "piece", style: at([(box[0] - within[0]) / width, (box[1] - within[1]) / height,
      (box[2] - within[0]) / width, (box[3] - within[1]) / height]) },
      photo(image, alt, zoomed([left, top, right, bottom])));
  }

  /** A patch: its cell in the sprite, and instead of it the same piece of the whole image, once that has more pixels. */
  function patch(layer, unit, rank, image, box) {
    const data = layer.data, alt = `Patch of ${data.images[image]}`, around = square(box, 1);
    const shown = cell(layer, unit, "patches", rank, alt), sharp = piece(data, image, box, around, alt);
    const whole = sharp.firstChild, side = around[2] - around[0], [width, height] = data.input;
    whole.addEventListener("load", () => {
      const pixels = side * Math.max(whole.naturalWidth / width, whole.naturalHeight / height);
      if (pixels > run.cell) shown.replaceChildren(sharp);
    });
    return shown;
  }

  /** A small box with what lies about it, enlarged, in the corner of the image that is farthest from it. */
  function inset(data, image, boxes) {
    const [, box] = boxes[0], [width, height] = data.input, within = square(box, 2.5);
    if (INSET * Math.max(box[2] - box[0], box[3] - box[1]) > Math.min(width, height)) return "";
    const corner = `width:${(42 * Math.min(width, height)) / width}%;${box[0] + box[2] < width ? "right" : "left"}:0;${box[1] + box[3] < height ? "bottom" : "top"}:0`;
    return el("span", { class: "inset", style: corner }, piece(data, image, within, within, "the box, enlarged"),
      ...boxes.map(([kind, [left, top, right, bottom]]) => frame(kind, shares(
        [left - within[0], top - within[1], right - within[0], bottom - within[1]], Array(2).fill(within[2] - within[0])))));
  }

  /** A button that shows something larger; large: makes it. */
  const enlargeable = (picture, words, large) => el("button", { type: "button", class: "enlarge", title: "enlarge",
    onclick: () => {
      const dialog = el("dialog", { onclick: () => dialog.close(), onclose: () => dialog.remove() }, large(),
        el("p", {}, el("button", { type: "button", class: "close" }, "Close"), " ", words));
      document.body.append(dialog);
      dialog.showModal();
    } }, picture);

  const isProjected = (data, unit) => data.projected.includes(unit);

  function winner(layer, unit, rank) {
    const data = layer.data, [value, image, row, column, ...field] = data.winners[unit][rank];
    const [left, top, right, bottom] = field, name = data.images[image];
    const centred = (side) => {
      const x = Math.floor((left + right - side) / 2), y = Math.floor((top + bottom - side) / 2);
      return [x, y, x + side, y + side];
    };
    const boxes = data.boxes && !data.whole ? [["field", field]] : [];
    if (data.effective) boxes.push(["effective", centred(data.effective)]);
    const frames = () => boxes.map(([kind, box]) => frame(kind, shares(box, data.input)));
    const where = `row ${row}, column ${column} of the map; ` + (!data.boxes ? "receptive field unknown"
      : data.whole ? "it sees the whole image" : `box ${left}, ${top} to ${right}, ${bottom}`);
    const words = `${rank + 1}. ${number(value)}, ${name}; ${where}`;
    const whole = (...over) => scene(data, image, `Whole image ${name}`, ...frames(), ...over);
    const pictures = [];
    const add = (text, picture, large) =>
      pictures.push(el("figure", {}, large ? enlargeable(picture, words, large) : picture, el("figcaption", {}, text)));
    if (data.crop !== "image") add("patch: " + data.shows,
      patch(layer, unit, rank, image, data.crop === "rf" ? field : centred(data.side)), whole);
    else add("whole image", whole(), whole);
    if (isProjected(data, unit)) add("projection",
      cell(layer, unit, "projections", rank, `Projection of the response to ${name}`));
    if (data.crop !== "image") add("whole image", whole(boxes.length ? inset(data, image, boxes) : ""), whole);
    if (data.responses) {
      const [x, y, x2, y2] = data.responses.area, [wide, high] = data.responses.neuron;
      const map = (...over) => scene(data, image, `Whole image ${name}`, ...over,
        el("span", { class: "over" }, cell(layer, unit, "responses", rank, `Response map for ${name}`, at([x, y, x2, y2]))),
        el("span", { class: "ring", style: `left:${100 * clamped(x + (column + 0.5) * wide)}%;` +
          `top:${100 * clamped(y + (row + 0.5) * high)}%` }));
      add("response map", map(), () => map(...frames()));
    }
    return el("li", {}, el("div", { class: "pictures", "data-count": pictures.length }, ...pictures),
      el("p", {}, el("b", {}, `${rank + 1}. ${number(value)}`), " ", el("a", { class: "name", href: unitvis.search.imageLink(image) }, name)),
      el("p", { class: "where" }, where));
  }

  function unitView(layer, unit) {
    const data = layer.data, fired = data.fired[unit], note = data.notes[unit];
    const [before, after] = neighbours(data, unit);
    const notFired = data.winners[unit].slice(fired);
    return [el("h1", {}, layer.name, " ", el("span", {}, "unit " + label(data, unit) + (data.names ? ": " + data.names[unit] : "")), data.filters ? filter(layer, unit) : ""),
      el("p", { class: "steps" },
        before === undefined ? "" : el("a", { href: link(layer.name, before), rel: "prev" }, "← " + label(data, before)),
        el("a", { href: link(layer.name) }, "↑ all units"),
        after === undefined ? "" : el("a", { href: link(layer.name, after), rel: "next" }, label(data, after) + " →")),
      note ? el("p", {}, noteMark(note), ": ", run.notes[note], ".") : "",
      data.classes && data.classes[unit] ? el("p", {}, "Its images by class: " + data.classes[unit] + ".") : "",
      fired ? el("p", { class: "legend" }, data.boxes && !data.whole ? el("span", { class: "field" }, "box: the receptive field") : "", " ",
        data.effective ? el("span", { class: "effective" }, "effective box: holds 90% of a response's squared gradient") : "",
        data.responses ? el("span", { class: "map" }, "response map: " + data.responses.colours) : "",
        isProjected(data, unit) ? `projection: grey is 0; ${data.projections}` : "") : "",
      el("ol", { class: "winners" }, ...Array.from({ length: fired }, (_, rank) => winner(layer, unit, rank))),
      notFired.length ? el("p", {}, `Did not fire: ${notFired.map(([value, image]) => `${data.images[image]} (${number(value)})`).join(", ")}.`) : "",
      ...usual(data, unit)];
  }

  // --- what is usual for a unit ---

  /** How many images of the sample give a response of each size, with a line for each winner that fired. */
  function histogram({ counts, extent }, values, words) {
    const [low, high] = extent.map(Number), most = Math.max(...counts, 1), wide = 480 / counts.length;
    const bars = counts.map((count, bin) => `<rect class="bar" x="${bin * wide}" y="${80 * (1 - count / most)}" ` +
      `width="${wide - 1}" height="${(80 * count) / most}"/>`);
    const marks = values.map((value) =>
      `<path class="mark" d="M${480 * clamped((Number(value) - low) / (high - low))} 0V88"/>`);
    const drawing = el("div", { class: "histogram", role: "img", "aria-label": words });
    drawing.innerHTML = `<svg viewBox="-2 0 484 90">${bars.join("")}${marks.join("")}` +  // of numbers alone
      '<path class="axis" d="M0 80.5H480"/></svg>';
    return drawing;
  }

  function usual(data, unit) {
    const entry = data.usual && data.usual[unit];
    if (!entry) return [];
    const { names, columns, file } = run.sample, last = entry.images.length - 1, fired = data.fired[unit];
    const counted = names.length - entry.left_out, rows = Math.ceil(names.length / columns);
    const words = `Responses to ${counted} images of the run, chosen by hash, from ${number(entry.extent[0])} to ` +
      `${number(entry.extent[1])}` + (fired ? `; lines: the ${fired} strongest of all images` : "") +
      (entry.left_out ? `; ${entry.left_out} more gave NaN or infinity` : "");
    const thumb = ([place, value], index) => el("li", {}, part("thumb", { source: "gallery/" + file, columns, rows,
      column: place % columns, row: Math.floor(place / columns) }, `Whole image ${names[place]}`, { title: names[place] }),
      el("span", {}, number(value), index === 0 ? " upper quartile" : index === last ? " lower quartile" : ""));
    return [el("section", { class: "usual" }, el("h2", {}, "What is usual"),
      histogram(entry, data.winners[unit].slice(0, fired).map(([value]) => value), words), el("p", {}, words + "."),
      el("p", {}, "Whole images at the quartiles, and around the median:"),
      el("ol", {}, ...entry.images.map(thumb)))];
  }

  function neighbours(data, unit) {
    const units = order(data), index = units.indexOf(unit);
    return [units[index - 1], units[index + 1]];
  }

  // --- navigation ---

  /** Parse an address into {layer, unit}, or {problem} where there is no such view. */
  function parse(hash) {
    const search = unitvis.search.parse(hash);
    if (search) return search;
    const [name, unit, more] = hash.replace(/^#/, "").split("/");
    if (!name) return {};
    let decoded;
    try { decoded = decodeURIComponent(name); } catch { decoded = name; }
    const layer = layers.get(decoded);
    if (!layer) return { problem: `There is no layer ${decoded} here.` };
    if (unit === undefined || unit === "") return { layer };
    if (more !== undefined || !/^\d+$/.test(unit) || Number(unit) >= layer.units)
      return { problem: `${decoded} has units 0 to ${layer.units - 1}, and no ${unit}.` };
    return { layer, unit: Number(unit) };
  }

  function load(layer) {
    if (layer.data) return Promise.resolve();
    return new Promise((done, failed) => {
      waiting.set(layer.name, done);
      document.head.append(el("script", { src: file(layer, "layer.js"), onerror: failed }));
    });
  }

  async function route() {
    const hash = location.hash, to = parse(hash);
    try { if (to.layer) await load(to.layer); else if (to.search) await unitvis.search.load(); }
    catch (error) { to.problem = error.message || `The file ${file(to.layer, "layer.js")} is missing; draw the gallery again.`; }
    if (location.hash !== hash) return;  // the address has changed meanwhile
    const from = shown;
    shown = to;
    for (const dialog of document.querySelectorAll("dialog")) dialog.close();
    draw();
    const back = to.layer && to.layer === from.layer && to.unit === undefined && $("unit-" + from.unit);
    if (back) { back.scrollIntoView({ block: "center" }); back.focus({ preventScroll: true }); }
    else { window.scrollTo(0, 0); $("view").focus({ preventScroll: true }); }
  }

  function draw() {
    const { layer, unit, problem, search } = shown;
    const content = problem ? [el("p", { role: "alert" }, problem)] : search ? unitvis.search.view(search)
      : !layer ? overview() : unit === undefined ? layerPage(layer) : unitView(layer, unit);
    $("view").replaceChildren(...content.filter((part) => part !== ""));
    const trail = [el("a", { href: "#" }, "All layers")];
    if (layer) trail.push(" / ", el("a", { href: link(layer.name) }, layer.name));
    if (unit !== undefined) trail.push(" / ", el("a", { href: link(layer.name, unit) }, label(layer.data, unit)));
    if (search && !problem) trail.push(" / ", unitvis.search.name(search));
    $("trail").replaceChildren(...trail);
    document.title = [unit === undefined ? "" : `unit ${label(layer.data, unit)}`, layer && layer.name,
      search && !problem && unitvis.search.name(search), run.title]
      .filter(Boolean).join(" – ");
    $("said").textContent = "";
  }

  function key(event) {
    if (document.querySelector("dialog")) return;  // in which Escape closes it
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const { layer, unit } = shown;
    if (event.key === "/") $("goto").focus();
    else if (unit !== undefined && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      const next = neighbours(layer.data, unit)[event.key === "ArrowLeft" ? 0 : 1];
      if (next !== undefined) location.hash = link(layer.name, next);
    } else if (unit !== undefined && (event.key === "ArrowUp" || event.key === "Escape")) location.hash = link(layer.name);
    else if (layer && (event.key === "ArrowLeft" || event.key === "ArrowRight")) step(event.key === "ArrowLeft" ? -1 : 1);
    else if (layer && event.key === "Escape") location.hash = "";
    else return;
    event.preventDefault();
  }

  /** Move the focus by so many tiles. */
  function step(by) {
    const tiles = [...document.querySelectorAll(".tile")], at = tiles.indexOf(document.activeElement);
    const next = tiles[at < 0 ? 0 : at + by];
    if (next) next.focus();
  }

  return {
    index(data) {
      run = data;
      for (const layer of data.layers) layers.set(layer.name, layer);
      $("layers").replaceChildren(...data.layers.map((layer) => el("option", { value: layer.name })));
      $("jump").addEventListener("submit", (event) => { event.preventDefault(); unitvis.search.jump($("goto").value); });
      document.addEventListener("keydown", key);
      window.addEventListener("hashchange", route);
      route();
    },
    layer(data) {
      layers.get(data.name).data = data;
      waiting.get(data.name)();
    },
    parts: { $, el, link, layers, patches, tileOf, parse, run: () => run, shown: () => shown },
  };
})();
