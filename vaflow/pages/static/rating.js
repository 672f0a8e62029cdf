"use strict";
// Rating by hand while the clip plays: drag in the plane, move two sliders, or use a gamepad's stick.
// The trace becomes a label CSV: time, valence, arousal, annotator.
(() => {
  // Samples of one clip, ascending in time. A new sample replaces what an earlier pass left since the previous one.
  class Trace {
    constructor() {
      this.samples = [];
      this.last = null; // time of the previous sample of this pass; null after a pause or a seek
    }

    add(t, v, a) {
      const time = Math.round(t * 1e6) / 1e6;
      const gap = this.last === null ? 0 : time - this.last;
      const from = gap > 0 && gap < 1 ? this.last : time;
      this.samples = this.samples.filter(([old]) => old < time - 1e-9 && (old <= from + 1e-9 || old > time) || old > time + 1e-9);
      const at = this.samples.findIndex(([old]) => old > time);
      this.samples.splice(at < 0 ? this.samples.length : at, 0, [time, v, a]);
      this.last = time;
    }

    csv(annotator) {
      const row = ([t, v, a]) => `${t.toFixed(6)},${v.toFixed(4)},${a.toFixed(4)},${annotator}`;
      return ["time,valence,arousal,annotator", ...this.samples.map(row), ""].join("\n");
    }
  }

  vaflow.Rating = class {
    constructor(root, plane, clock) {
      Object.assign(this, { root, plane, clock, traces: new Map(), value: [0, 0], held: false, on: false, unsaved: false });
      const part = (name) => root.querySelector(`[data-rating="${name}"]`);
      this.parts = Object.fromEntries(["on", "name", "valence", "arousal", "save", "clear", "count", "fields"].map((n) => [n, part(n)]));
      this.parts.on.addEventListener("click", () => this.toggle());
      this.parts.save.addEventListener("click", () => this.save());
      this.parts.clear.addEventListener("click", () => this.clear());
      if (vaflow.data.serve) this.parts.save.textContent = "Save ratings";
      this.page = `${Date.now()} ${Math.random()}`; // the server keeps the ratings that another page saved
      addEventListener("beforeunload", (event) => this.unsaved && event.preventDefault());
      vaflow.DIMENSIONS.forEach((name, k) => {
        this.parts[name].addEventListener("input", () => {
          this.value = this.value.map((old, i) => (i === k ? Number(this.parts[name].value) : old));
          this.sliding = performance.now();
          this.sample();
        });
      });
      this.listen(plane.canvas);
      const loop = () => {
        this.poll();
        requestAnimationFrame(loop);
      };
      requestAnimationFrame(loop);
    }

    listen(canvas) {
      canvas.addEventListener("pointerdown", (event) => {
        if (!this.on || event.button) return;
        this.held = true;
        canvas.setPointerCapture(event.pointerId);
        this.move(event);
        if (!this.clock.playing) this.clock.play();
      });
      canvas.addEventListener("pointermove", (event) => this.held && this.move(event));
      for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.release());
    }

    move(event) {
      this.value = this.plane.valueAt(event);
      this.sample();
    }

    release() {
      this.held = false;
      const trace = this.traces.get(this.item);
      if (trace) trace.last = null;
    }

    // Between events the value holds; it is sampled once per screen refresh.
    poll() {
      if (!this.on) return;
      const pad = [...(navigator.getGamepads ? navigator.getGamepads() : [])].find((p) => p && p.axes.length > 1);
      const moved = pad && Math.hypot(pad.axes[0], pad.axes[1]) > 0.08;
      if (moved) this.value = [vaflow.clamp(pad.axes[0], -1, 1), vaflow.clamp(-pad.axes[1], -1, 1)];
      const sliders = document.activeElement === this.parts.valence || document.activeElement === this.parts.arousal;
      if (this.clock.playing && (this.held || moved || (sliders && this.sliding))) this.sample();
    }

    sample() {
      if (!this.on || !this.item) return;
      if (this.clock.playing) {
        if (!this.traces.has(this.item)) this.traces.set(this.item, new Trace());
        this.traces.get(this.item).add(this.clock.time, ...this.value);
        this.unsaved = true;
      }
      vaflow.DIMENSIONS.forEach((name, k) => (this.parts[name].value = this.value[k].toFixed(3)));
      this.plane.rating = this.value;
      this.plane.draw(this.plane.row || 0);
      this.report();
    }

    // A seek interrupts a pass: what lies between is not replaced.
    interrupt() {
      const trace = this.traces.get(this.item);
      if (trace) trace.last = null;
    }

    show(item) {
      this.release();
      this.item = item;
      this.report();
    }

    toggle() {
      this.on = !this.on;
      this.parts.on.setAttribute("aria-pressed", this.on);
      this.parts.fields.hidden = !this.on;
      this.plane.canvas.classList.toggle("rating", this.on);
      this.plane.rating = this.on ? this.value : null;
      this.plane.draw(this.plane.row || 0);
      this.report();
    }

    // Commas, quotes and line breaks would break a CSV; slashes would break a file name.
    get annotator() {
      return this.parts.name.value.trim().replace(/[^\p{L}\p{N} ._-]/gu, "_").replace(/^\.+/, "").slice(0, 60);
    }

    report(text) {
      const trace = this.traces.get(this.item), count = trace ? trace.samples.length : 0;
      this.parts.count.textContent = text || (count ? `${count} samples of this clip` : "no samples of this clip");
      this.parts.save.disabled = this.parts.clear.disabled = !count;
    }

    clear() {
      this.traces.delete(this.item);
      this.report();
    }

    async save() {
      const name = this.annotator;
      if (!name) {
        this.report("Enter the annotator's name first.");
        this.parts.name.focus();
        return;
      }
      const text = this.traces.get(this.item).csv(name);
      if (vaflow.data.serve) {
        const { token } = vaflow.data.serve;
        const body = JSON.stringify({ clip: this.item, annotator: name, csv: text, page: this.page });
        const answer = await fetch("ratings", { method: "POST", body, headers: { "Content-Type": "application/json", "X-Vaflow-Token": token } }).catch(() => null);
        if (answer && answer.ok) this.unsaved = false;
        this.report(answer && answer.ok ? `Saved: ${await answer.text()}` : "The server did not save the ratings.");
        return;
      }
      const link = vaflow.element("a", { download: `${this.item.replace(/[^\p{L}\p{N}._-]/gu, "_")}.${name.replace(/[ .]/g, "_")}.csv` });
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      document.body.append(link);
      link.click();
      link.remove();
      this.unsaved = false;
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  };
})();
