"use strict";
// The lanes under the video, on one time axis: two traces, waveform, masks, regions.
(() => {
  const LEFT = 48, RIGHT = 10; // pixels beside the plots; the same in all lanes
  const TRACE = 118, WAVE = 46, SPEECH = 8, MASK = 11, REGION = 8;
  const MASKS = [["noFace", "no face", "noface", 6], ["noAudio", "no audio", "noaudio", -6], ["unlabelled", "unlabelled", "unlabelled", 0], ["far", "far from training", "far", null]];

  // Rows between rows without a value: no line leads to them, so they are drawn as points.
  function isolated(plot, series) {
    const column = plot.data[series], empty = (i) => column[i] === null || column[i] === undefined;
    return Object.keys(column).map(Number).filter((i) => !empty(i) && empty(i - 1) && empty(i + 1));
  }

  // A translucent span; hatching differs by kind, so that colour is not needed to tell them apart.
  function shade(context, x, y, width, height, color, slant, strength = 1) {
    context.save();
    context.beginPath();
    context.rect(x, y, Math.max(width, 1), height);
    context.clip();
    context.globalAlpha = 0.22 * strength;
    context.fillStyle = color;
    context.fill();
    context.globalAlpha = 0.75 * strength;
    context.strokeStyle = color;
    context.lineWidth = 1;
    context.beginPath();
    if (slant === null) { // horizontal lines
      for (let at = y + 2; at < y + height; at += 4) {
        context.moveTo(x, at);
        context.lineTo(x + width, at);
      }
    } else {
      for (let at = slant ? x - height : x + 3; at < x + width + height; at += 6) {
        context.moveTo(at, slant < 0 ? y : y + height);
        context.lineTo(slant ? at + height : at, slant < 0 ? y + height : y);
      }
    }
    context.stroke();
    context.restore();
  }

  vaflow.Lanes = class {
    constructor(root, onSeek, onSpan) {
      this.root = root;
      this.plots = vaflow.DIMENSIONS.map(() => null);
      this.hosts = vaflow.DIMENSIONS.map((d) => root.querySelector(`[data-trace="${d}"]`));
      this.canvas = Object.fromEntries(["wave", "masks", "regions"].map((n) => [n, root.querySelector(`[data-strip="${n}"]`)]));
      this.playhead = root.querySelector("#playhead");
      this.loop = root.querySelector("#loop");
      this.clip = null;
      this.range = [0, 1];
      new ResizeObserver(() => this.draw()).observe(root);
      vaflow.onTheme(() => this.draw(true));
      this.listen(onSeek, onSpan);
    }

    get width() {
      return Math.max(10, this.root.clientWidth - LEFT - RIGHT);
    }

    x(t) {
      return LEFT + ((t - this.range[0]) / (this.range[1] - this.range[0])) * this.width;
    }

    timeAt(event) {
      const share = (event.clientX - this.root.getBoundingClientRect().left - LEFT) / this.width;
      return this.range[0] + vaflow.clamp(share, 0, 1) * (this.range[1] - this.range[0]);
    }

    // A click seeks; a drag of more than 5 pixels chooses a span.
    listen(onSeek, onSpan) {
      let down = null;
      this.root.addEventListener("pointerdown", (event) => {
        if (event.button || !this.clip) return;
        down = { x: event.clientX, time: this.timeAt(event), span: false };
        this.root.setPointerCapture(event.pointerId);
      });
      this.root.addEventListener("pointermove", (event) => {
        if (!down) return;
        down.span = down.span || Math.abs(event.clientX - down.x) > 5;
        if (down.span) this.showLoop([down.time, this.timeAt(event)].sort((a, b) => a - b));
      });
      this.root.addEventListener("pointerup", (event) => {
        if (!down) return;
        const begun = down;
        down = null;
        if (begun.span) onSpan([begun.time, this.timeAt(event)].sort((a, b) => a - b));
        else onSeek(begun.time);
      });
      this.root.addEventListener("pointercancel", () => (down = null));
      this.root.addEventListener("wheel", (event) => {
        if (!this.clip || !event.ctrlKey) return;
        event.preventDefault();
        const t = this.timeAt(event), factor = event.deltaY > 0 ? 1.25 : 0.8;
        this.zoom([t - (t - this.range[0]) * factor, t + (this.range[1] - t) * factor]);
      }, { passive: false });
    }

    show(clip) {
      this.clip = clip;
      this.range = [0, Math.max(clip.end, 0.04)];
      this.draw(true);
    }

    zoom([low, high]) {
      const end = Math.max(this.clip.end, 0.04);
      const length = vaflow.clamp(high - low, Math.min(0.5, end), end);
      const start = vaflow.clamp(low, 0, end - length);
      this.range = [start, start + length];
      this.draw();
    }

    showLoop(span) {
      this.span = span;
      this.loop.hidden = !span;
      if (!span) return;
      const [a, b] = span.map((t) => vaflow.clamp(this.x(t), LEFT, LEFT + this.width));
      this.loop.style.transform = `translateX(${a}px)`;
      this.loop.style.width = `${Math.max(2, b - a)}px`;
    }

    cursor(t) {
      this.at = t;
      const inside = t >= this.range[0] && t <= this.range[1];
      this.playhead.hidden = !inside;
      if (inside) this.playhead.style.transform = `translateX(${this.x(t)}px)`;
    }

    draw(anew = false) {
      if (!this.clip || !this.root.clientWidth) return;
      vaflow.DIMENSIONS.forEach((_, k) => this.drawTrace(k, anew));
      this.drawWave();
      this.drawMasks();
      this.drawRegions();
      this.showLoop(this.span || null);
      this.cursor(this.at || 0);
    }

    drawTrace(k, anew) {
      const { clip, range } = this;
      const series = [clip.value[k], clip.label ? clip.label[k] : null];
      if (clip.std) series.push(clip.upper[k], clip.lower[k]);
      const data = vaflow.reduce(clip.time, series, ...range, Math.ceil(this.width));
      const empty = data[0].map(() => null);
      const filled = data.map((column) => column || empty);
      const plot = this.plots[k];
      if (plot && !anew) {
        plot.setSize({ width: this.root.clientWidth, height: TRACE });
        plot.setData(filled, false);
        plot.setScale("x", { min: range[0], max: range[1] });
        return;
      }
      if (plot) plot.destroy();
      this.plots[k] = new uPlot(this.options(Boolean(clip.std)), filled, this.hosts[k]);
    }

    options(band) {
      const [soft, grid] = [vaflow.color("soft"), vaflow.color("grid")];
      const axis = { stroke: soft, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "11px system-ui, sans-serif" };
      const edge = { stroke: "transparent", points: { show: false } };
      const colored = (name, width) => ({ stroke: vaflow.color(name), width, points: { show: false, filter: isolated, size: 4, fill: vaflow.color(name) } });
      return {
        width: this.root.clientWidth,
        height: TRACE,
        padding: [8, RIGHT, 0, 0],
        cursor: { show: false },
        legend: { show: false },
        select: { show: false },
        scales: { x: { time: false, range: () => this.range }, y: { range: [-1.05, 1.05] } },
        axes: [
          { ...axis, size: 20, gap: 2, values: (_, ticks) => ticks.map((t) => (this.range[1] < 60 ? `${+t.toFixed(2)} s` : vaflow.seconds(t).replace(/\.00$/, ""))) },
          { ...axis, size: LEFT, splits: () => [-1, -0.5, 0, 0.5, 1], values: (_, ticks) => ticks.map((v) => vaflow.number(v, 1)) },
        ],
        series: [
          {},
          colored("prediction", 2),
          { ...colored("label", 1.5), dash: [6, 4] },
          ...(band ? [edge, edge] : []),
        ],
        bands: band ? [{ series: [3, 4], fill: vaflow.color("band") }] : [],
        hooks: { drawClear: [(plot) => this.shadePlot(plot)] },
      };
    }

    shadePlot(plot) {
      const { ctx, bbox } = plot, ratio = window.devicePixelRatio || 1;
      ctx.save();
      ctx.scale(ratio, ratio);
      for (const [name, , color, slant] of MASKS) {
        for (const [a, b] of this.clip[name] || []) {
          const [x0, x1] = [a, b].map((t) => vaflow.clamp(this.x(t), LEFT, LEFT + this.width));
          if (x1 > x0) shade(ctx, x0, bbox.top / ratio, x1 - x0, bbox.height / ratio, vaflow.color(color), slant, 0.4);
        }
      }
      ctx.restore();
    }

    drawWave() {
      const { context, width, height } = vaflow.fit(this.canvas.wave, WAVE + SPEECH + 4);
      const { low, high, speech, peak } = this.clip; // the loudest sample fills the lane
      context.font = "11px system-ui, sans-serif";
      context.fillStyle = vaflow.color("soft");
      if (!low) {
        context.fillText("no audio data", LEFT + 4, WAVE / 2 + 4);
        return;
      }
      context.fillStyle = vaflow.color("wave");
      const step = 0.02, middle = WAVE / 2;
      for (let x = 0; x < this.width; x++) {
        const t = (px) => this.range[0] + (px / this.width) * (this.range[1] - this.range[0]);
        const [a, b] = [Math.floor(t(x) / step), Math.max(Math.floor(t(x + 1) / step), Math.floor(t(x) / step) + 1)];
        let [min, max] = [0, 0];
        for (let i = Math.max(0, a); i < Math.min(b, low.length); i++) {
          if (low[i] < min) min = low[i];
          if (high[i] > max) max = high[i];
        }
        context.fillRect(LEFT + x, middle - (max / peak) * middle, 1, Math.max(1, ((max - min) / peak) * middle));
      }
      context.fillStyle = vaflow.color("speech");
      for (const [a, b] of speech || []) {
        const [x0, x1] = [a, b].map((t) => vaflow.clamp(this.x(t), LEFT, LEFT + this.width));
        if (x1 > x0) context.fillRect(x0, height - SPEECH, x1 - x0, SPEECH - 2);
      }
    }

    drawMasks() {
      const shown = MASKS.filter(([name]) => name !== "far" || this.clip.far);
      const { context } = vaflow.fit(this.canvas.masks, shown.length * (MASK + 3));
      context.font = "10px system-ui, sans-serif";
      shown.forEach(([name, text, color, slant], row) => {
        const y = row * (MASK + 3);
        context.fillStyle = vaflow.color("soft");
        context.textAlign = "right";
        const known = this.clip[name];
        context.fillText({ noFace: "face", noAudio: "audio", unlabelled: "label", far: "far" }[name], LEFT - 6, y + MASK - 1);
        context.textAlign = "left";
        context.strokeStyle = vaflow.color("grid");
        context.strokeRect(LEFT + 0.5, y + 0.5, this.width - 1, MASK);
        if (!known) context.fillText(name === "unlabelled" ? "no labels" : "not recorded", LEFT + 4, y + MASK - 1);
        for (const [a, b] of known || []) {
          const [x0, x1] = [a, b].map((t) => vaflow.clamp(this.x(t), LEFT, LEFT + this.width));
          if (x1 > x0) shade(context, x0, y, x1 - x0, MASK, vaflow.color(color), slant);
        }
      });
    }

    drawRegions() {
      const { context } = vaflow.fit(this.canvas.regions, 9 * REGION + 2);
      const { time, value } = this.clip, { centers, sigma } = vaflow.data;
      const heat = vaflow.color("heat"), step = 2;
      for (let x = 0; x < this.width; x += step) {
        const i = vaflow.nearest(time, this.range[0] + ((x + step / 2) / this.width) * (this.range[1] - this.range[0]));
        if (Number.isNaN(value[0][i])) continue;
        vaflow.regions(value[0][i], value[1][i], centers, sigma).forEach((weight, r) => {
          context.fillStyle = `rgba(${heat}, ${Math.min(1, weight * 1.6).toFixed(3)})`;
          context.fillRect(LEFT + x, (8 - r) * REGION, step, REGION - 1);
        });
      }
      context.font = "10px system-ui, sans-serif";
      context.fillStyle = vaflow.color("soft");
      context.textAlign = "right";
      ["−", "0", "+"].forEach((text, v) => context.fillText(`v ${text}`, LEFT - 6, (8 - 3 * v) * REGION));
    }
  };
})();
