"use strict";
// The viewer: one clip at a time, its media and plots on one clock.
(() => {
  const get = (id) => document.getElementById(id);
  const media = get("media"), readout = get("readout"), seekBar = get("seek");
  const box = get("box"), svg = get("boxes");
  let clip = null; // decoded data of the clip that is shown
  let facts = null; // its row in the list
  let row = 0;
  const wanted = new Map(); // number -> what waits for the clip's file

  const clock = new vaflow.Clock(media, onTime, onState);
  const plane = new vaflow.Plane(get("plane"));
  const rating = new vaflow.Rating(get("rating"), plane, clock);
  const lanes = new vaflow.Lanes(get("lanes"), seek, setLoop);
  const list = new vaflow.ClipList(get("clips"), vaflow.data.clips, show);

  // Called by the file of a clip, which a script element loads: pages from disk cannot fetch.
  vaflow.receive = ([number, document]) => {
    const waiting = wanted.get(number);
    wanted.delete(number);
    if (waiting) waiting(document);
  };

  function show(chosen) {
    facts = chosen;
    list.select(chosen);
    history.replaceState(null, "", `#clip=${encodeURIComponent(chosen.id)}`);
    get("title").textContent = chosen.id;
    get("notes").replaceChildren(...chosen.notes.map((note) => vaflow.element("li", {}, note)));
    const script = vaflow.element("script", { src: `clips/${String(chosen.number).padStart(4, "0")}.js` });
    wanted.set(chosen.number, (document) => {
      script.remove();
      if (facts === chosen) start(vaflow.decode(document));
    });
    script.addEventListener("error", () => {
      if (facts !== chosen) return;
      clip = null; // the player and the traces are of the clip before
      clock.load(null, false, 0);
      showParts(false);
      readout.textContent = "The data of this clip cannot be loaded: the clips directory must lie beside this page.";
    });
    document.body.append(script);
  }

  function showParts(visible) {
    const parts = document.querySelectorAll(".stage, .controls, #rating, #lanes");
    parts.forEach((part) => part.classList.toggle("hidden", !visible));
  }

  function start(decoded) {
    clip = decoded;
    showParts(true);
    plane.clip = clip;
    media.hidden = !facts.media;
    get("no-media").hidden = Boolean(facts.media);
    document.querySelectorAll("[data-when]").forEach((node) => (node.hidden = !clip[node.dataset.when]));
    seekBar.max = clip.end.toFixed(3);
    setLoop(null);
    lanes.show(clip);
    clock.load(facts.media, facts.video, clip.end);
    rating.show(facts.id);
    document.documentElement.dataset.ready = facts.id;
  }

  function onTime(t, shown) {
    if (!clip) return;
    row = shown ? vaflow.nearest(clip.time, t) : Math.max(0, vaflow.after(clip.time, t + 1e-6) - 1);
    const at = clip.time[row];
    lanes.cursor(facts.video ? at : t);
    if (at > lanes.range[1] || at < lanes.range[0]) lanes.zoom([at, at + lanes.range[1] - lanes.range[0]]);
    plane.draw(row);
    seekBar.value = t.toFixed(3);
    seekBar.setAttribute("aria-valuetext", vaflow.seconds(t));
    drawBox(at);
    document.documentElement.dataset.row = row;
    const { number, signed } = vaflow;
    const [v, a] = clip.value.map((column) => column[row]);
    const spread = clip.std ? clip.std.map((column) => ` ± ${number(column[row])}`) : ["", ""];
    const label = clip.label && clip.label.map((column) => (Number.isNaN(column[row]) ? "–" : signed(column[row])));
    const region = vaflow.regionName(vaflow.regionOf(v, a, vaflow.data.centers));
    const prediction = Number.isNaN(v) ? "No prediction." : `Valence ${signed(v)}${spread[0]}, arousal ${signed(a)}${spread[1]} (${region}).`;
    const between = clip.interpolated && clip.interpolated[row] ? " Interpolated between samples." : "";
    readout.textContent =
      `${vaflow.seconds(at)} of ${vaflow.seconds(clip.end)}, frame ${row}. ${prediction}${between}` +
      (label ? ` Label: valence ${label[0]}, arousal ${label[1]}.` : "");
  }

  function drawBox(t) {
    box.setAttribute("visibility", "hidden");
    if (!clip.boxes || !clip.boxTime.length || !media.videoWidth) return;
    const i = vaflow.nearest(clip.boxTime, t) * 5;
    const [time, x0, y0, x1, y1] = clip.boxes.subarray(i, i + 5);
    if (Number.isNaN(x0) || Math.abs(time - t) > 1) return;
    const [width, height] = [media.videoWidth, media.videoHeight];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const place = { x: x0 * width, y: y0 * height, width: (x1 - x0) * width, height: (y1 - y0) * height };
    for (const [name, value] of Object.entries(place)) box.setAttribute(name, value);
    box.setAttribute("visibility", "visible");
  }

  function onState(problem) {
    const play = get("play");
    play.textContent = clock && clock.playing ? "Pause" : "Play";
    play.setAttribute("aria-pressed", Boolean(clock && clock.playing));
    if (problem) get("notes").append(vaflow.element("li", {}, problem));
  }

  function seek(t) {
    rating.interrupt();
    clock.seek(t);
  }

  // A quarter of the way into a frame: rounding cannot show its neighbour.
  function seekFrame(index) {
    const i = vaflow.clamp(index, 0, clip.time.length - 1);
    const next = i + 1 < clip.time.length ? clip.time[i + 1] : clip.end;
    clock.pause();
    seek(clip.time[i] + (next - clip.time[i]) / 4);
  }

  function setLoop(span) {
    clock.span = span;
    lanes.showLoop(span);
    get("unloop").disabled = get("zoom-loop").disabled = !span;
    if (span && (clock.time < span[0] || clock.time > span[1])) seek(span[0]);
  }

  function loopEdge(edge) {
    const [a, b] = clock.span || [0, clip.end];
    const span = edge ? [a, clock.time] : [clock.time, b];
    if (span[1] - span[0] > 0.05) setLoop(span);
  }

  function speed(step) {
    const select = get("speed");
    select.selectedIndex = vaflow.clamp(select.selectedIndex + step, 0, select.options.length - 1);
    clock.setRate(Number(select.value));
  }

  function zoom(factor) {
    const [a, b] = lanes.range, t = vaflow.clamp(clock.time, a, b);
    lanes.zoom([t - (t - a) * factor, t + (b - t) * factor]);
  }

  function showNext(step) {
    const next = list.next(step); // none if the filter leaves no clip
    if (next) show(next);
  }

  const keys = {
    " ": () => clock.toggle(),
    ArrowLeft: (event) => seek(clock.time - (event.shiftKey ? 5 : 1)),
    ArrowRight: (event) => seek(clock.time + (event.shiftKey ? 5 : 1)),
    ",": () => seekFrame(row - 1),
    ".": () => seekFrame(row + 1),
    Home: () => seek(0),
    End: () => seekFrame(clip.time.length - 1),
    "<": () => speed(-1),
    ">": () => speed(1),
    "[": () => loopEdge(0),
    "]": () => loopEdge(1),
    l: () => setLoop(null),
    "+": () => zoom(0.5),
    "=": () => zoom(0.5),
    "-": () => zoom(2),
    0: () => lanes.zoom([0, clip.end]),
    n: () => showNext(1),
    p: () => showNext(-1),
  };

  document.addEventListener("keydown", (event) => {
    const target = event.target, typing = target.matches("input:not([type=range]), textarea, select");
    const slider = target.matches("#rating input[type=range]") && event.key.startsWith("Arrow");
    const pressing = target.matches("button, summary, a") && (event.key === " " || event.key === "Enter");
    const moving = event.key === "n" || event.key === "p"; // also if the data of this clip cannot be loaded
    if (!(clip || moving) || typing || slider || pressing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key](event);
  });

  get("play").addEventListener("click", () => clock.toggle());
  get("speed").addEventListener("change", (event) => clock.setRate(Number(event.target.value)));
  seekBar.addEventListener("input", () => seek(Number(seekBar.value)));
  get("loop-from").addEventListener("click", () => loopEdge(0));
  get("loop-to").addEventListener("click", () => loopEdge(1));
  get("unloop").addEventListener("click", () => setLoop(null));
  get("zoom-loop").addEventListener("click", () => clock.span && lanes.zoom(clock.span));
  get("zoom-in").addEventListener("click", () => zoom(0.5));
  get("zoom-out").addEventListener("click", () => zoom(2));

  function fromAddress() {
    const [, text] = location.hash.match(/^#clip=(.*)$/) || ["", ""];
    let id = text;
    try {
      id = decodeURIComponent(text);
    } catch (error) {
      if (!(error instanceof URIError)) throw error;
    }
    return vaflow.data.clips.find((c) => c.id === id);
  }
  addEventListener("hashchange", () => fromAddress() && fromAddress() !== facts && show(fromAddress()));
  show(fromAddress() || vaflow.data.clips[0]);
})();
