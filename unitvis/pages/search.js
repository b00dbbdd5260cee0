// Searching, and the views of images: #find=TEXT lists layers and images, #image=ID the units in which an image wins.
"use strict";

unitvis.search = (({ $, el, link, layers, patches, tileOf, run, shown, parse }) => {
  const MOST = 200;  // images in a list
  let known, loading;  // {names: {image: name}, wins: {image: [[index of a layer, unit * k + rank, ...], ...]}}

  const imageLink = (image) => "#image=" + image;
  const place = (rank) => (rank === 0 ? "the strongest" : `number ${rank + 1} of ${run().k}`);
  const photo = (image) => el("img", { src: `gallery/images/${image}.jpg`, alt: known.names[image], decoding: "async" });

  /** The name of a unit: its number, or a neuron's channel/row/column. */
  function label(layer, unit) {
    if (!layer.neurons) return String(unit);
    const [height, width] = layer.neurons;
    return [Math.floor(unit / (height * width)), Math.floor(unit / width) % height, unit % width].join("/");
  }

  /** The layers that a text names, best first: in any case, its beginning up to a dot or the like, else any part. */
  function layersLike(text) {
    const all = [...layers.values()], wanted = text.toLowerCase(), name = (layer) => layer.name.toLowerCase();
    if (layers.has(text)) return [layers.get(text)];
    const kinds = [(layer) => name(layer) === wanted,
      (layer) => name(layer).startsWith(wanted) && !/[\p{L}\p{N}]/u.test(name(layer)[wanted.length]),
      (layer) => name(layer).startsWith(wanted), (layer) => name(layer).includes(wanted)];
    return wanted ? kinds.map((kind) => all.filter(kind)).find((found) => found.length) || [] : [];
  }

  /** The layers that a text names, with the unit that stands behind its last slash if the whole text names none. */
  function placesLike(text) {
    const whole = layersLike(text), slash = text.lastIndexOf("/");
    if (whole.length || slash < 0) return whole.map((layer) => ({ layer }));
    return layersLike(text.slice(0, slash)).map((layer) => ({ layer, unit: text.slice(slash + 1) }));
  }

  function imagesLike(text) {
    const wanted = text.toLowerCase();
    return Object.keys(known.names).filter((image) => known.names[image].toLowerCase().includes(wanted));
  }

  /** The view that an address names; undefined for those of layers. */
  function parseHash(hash) {
    const [, kind, text] = /^#(image|find)=(.*)$/s.exec(hash) || [];
    if (kind === "image") return { search: { image: text } };
    try { return kind && { search: { text: decodeURIComponent(text) } }; } catch { return { search: { text } }; }
  }

  function load() {
    loading = loading || new Promise((done, failed) => document.head.append(el("script", { src: "gallery/images.js",
      onload: done, onerror: () => failed(new Error("The file gallery/images.js is missing; draw the gallery again.")) })));
    return loading;
  }

  function imageView(image) {
    if (!Object.hasOwn(known.names, image)) return [el("p", { role: "alert" }, `No unit is won by an image of number ${image}.`)];
    const every = [...layers.values()], wins = known.wins[image];
    const units = wins.reduce((sum, [, ...codes]) => sum + codes.length, 0);
    return [el("h1", {}, known.names[image]), el("div", { class: "photo" }, photo(image)),
      el("p", {}, `Among the ${run().k} strongest images of ${units} units in ${wins.length} layers.`),
      ...wins.flatMap(([index, ...codes]) => {
        const layer = every[index];
        return [el("h2", {}, el("a", { href: link(layer.name) }, layer.name)),
          el("div", { class: "grid" }, ...codes.map((code) => {
            const unit = Math.floor(code / run().k), name = label(layer, unit);
            return el("a", { class: "tile", href: link(layer.name, unit) },
              patches(tileOf(layer, unit, "patches"), `Patches of unit ${name} of ${layer.name}`),
              el("b", {}, name), el("span", { class: "value" }, place(code % run().k)));
          }))];
      })];
  }

  function list(text) {
    const places = placesLike(text), images = imagesLike(text), shownImages = images.slice(0, MOST);
    const more = images.length > MOST ? `, of which these are the first ${MOST}` : "";
    return [el("h1", {}, text),
      places.length ? el("ul", {}, ...places.map(({ layer, unit }) =>
        el("li", {}, el("a", { href: link(layer.name, unit) }, layer.name + (unit === undefined ? "" : "/" + unit))))) : "",
      el("p", {}, `${images.length || "No"} images that win in a unit have this in their names${more}.`),
      el("div", { class: "grid" }, ...shownImages.map((image) => el("a", { class: "tile", href: imageLink(image) },
        el("span", { class: "photo" }, photo(image)), el("span", { class: "name" }, known.names[image]))))];
  }

  /** Go to a unit of the layer on view (its number or its class), a layer, layer/unit or an image; to a list where several are meant. */
  async function jump(text) {
    const wanted = text.trim(), { layer } = shown();
    if (!wanted) return;
    const said = (problem) => { $("said").textContent = problem || ""; };
    const among = (names) => (layer && names(layer.data) || []).indexOf(wanted);
    const own = among((data) => data.labels), named = layers.has(wanted) ? -1 : among((data) => data.names);
    const places = placesLike(wanted);
    let hash;
    if (own >= 0) hash = link(layer.name, own);
    else if (layer && /^\d+$/.test(wanted) && !layers.has(wanted)) hash = link(layer.name, Number(wanted));
    else if (named >= 0) hash = link(layer.name, named);
    else if (places.length === 1) hash = link(places[0].layer.name, places[0].unit);
    else {
      try { await load(); } catch (error) { return said(error.message); }
      const images = imagesLike(wanted);
      if (places.length + images.length === 0)
        return said(`No layer is called ${wanted}, and no image that wins in a unit.`);
      hash = images.length === 1 && !places.length ? imageLink(images[0]) : "#find=" + encodeURIComponent(wanted);
    }
    const { problem } = parse(hash);
    said(problem);
    if (problem) return;
    $("goto").value = "";
    $("goto").blur();
    location.hash = hash;
  }

  return { jump, imageLink, parse: parseHash, load,
    name: ({ image, text }) => (image === undefined ? text : Object.hasOwn(known.names, image) ? known.names[image] : image),
    view: ({ image, text }) => (image === undefined ? list(text) : imageView(image)),
    images(data) { known = data; } };
})(unitvis.parts);
