"use strict";
// Decode a clip's arrays, find the row of an instant, and reduce long traces to the width of the screen.
(() => {
  function array(text, type) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new type(bytes.buffer);
  }

  function clock(document) {
    if (document.values) return array(document.values, Float64Array);
    return Float64Array.from({ length: document.count }, (_, i) => document.start + document.step * i);
  }

  vaflow.decode = (document) => {
    const columns = (name) => (document[name] ? document[name].map((text) => array(text, Float32Array)) : null);
    const time = clock(document.time);
    const boxes = document.boxes ? array(document.boxes, Float32Array) : null;
    const low = document.low ? array(document.low, Int8Array) : null;
    const high = document.high ? array(document.high, Int8Array) : null;
    const loudest = (peak, [min, max]) => Math.max(peak, -min, max);
    const value = columns("value"), std = columns("std");
    const edges = (sign) => std && value.map((column, k) => column.map((v, i) => v + sign * 1.96 * std[k][i]));
    return {
      time,
      upper: edges(1),
      lower: edges(-1),
      peak: low ? low.reduce((peak, min, i) => loudest(peak, [min, high[i]]), 4) : 0,
      end: time[time.length - 1] + (time.length > 1 ? (time[time.length - 1] - time[0]) / (time.length - 1) : 0.04),
      value,
      label: columns("label"),
      std,
      noFace: document.noFace,
      noAudio: document.noAudio,
      unlabelled: document.unlabelled || null,
      far: document.far || null,
      interpolated: document.interpolated ? array(document.interpolated, Uint8Array) : null,
      boxes,
      boxTime: boxes ? Float64Array.from({ length: boxes.length / 5 }, (_, i) => boxes[5 * i]) : null,
      low,
      high,
      speech: document.speech || null,
    };
  };

  // Index of the first time > t.
  function after(time, t) {
    let [low, high] = [0, time.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (time[middle] > t) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  vaflow.after = after;

  // Row nearest to an instant: what the media element calls a frame's time may be rounded.
  vaflow.nearest = (time, t) => {
    const right = Math.min(after(time, t), time.length - 1);
    const left = Math.max(0, right - 1);
    return t - time[left] <= time[right] - t ? left : right;
  };

  // Traces between two instants in at most 2 * buckets points: the lowest and the highest value of each bucket.
  // Returns [x, y1, y2, ...] for uPlot. Every series keeps its extremes, so that no peak disappears.
  vaflow.reduce = (time, series, low, high, buckets) => {
    const first = Math.max(0, after(time, low) - 2);
    const last = Math.min(time.length, after(time, high) + 2);
    const plain = (column) => (column ? Array.from(column.subarray(first, last), (v) => (Number.isNaN(v) ? null : v)) : null);
    if (last - first <= 2 * buckets) return [Array.from(time.subarray(first, last)), ...series.map(plain)];
    const x = new Array(2 * buckets);
    const out = series.map((column) => (column ? new Array(2 * buckets) : null));
    for (let b = 0; b < buckets; b++) {
      const begin = first + Math.floor((b * (last - first)) / buckets);
      const end = first + Math.floor(((b + 1) * (last - first)) / buckets);
      x[2 * b] = time[begin];
      x[2 * b + 1] = time[end - 1] > time[begin] ? time[end - 1] : time[begin] + 1e-9;
      series.forEach((column, s) => {
        if (!column) return;
        let [min, max, minAt, maxAt] = [Infinity, -Infinity, 0, 0];
        for (let i = begin; i < end; i++) {
          const v = column[i];
          if (v < min) [min, minAt] = [v, i];
          if (v > max) [max, maxAt] = [v, i];
        }
        const there = min <= max;
        out[s][2 * b] = there ? (minAt <= maxAt ? min : max) : null;
        out[s][2 * b + 1] = there ? (minAt <= maxAt ? max : min) : null;
      });
    }
    return [x, ...out];
  };

  // Soft weight of the nine regions at a point; region 3 * v + a.
  vaflow.regions = (v, a, centers, sigma) => {
    const weights = [];
    let total = 0;
    for (let r = 0; r < 9; r++) {
      const dv = v - centers * (Math.floor(r / 3) - 1);
      const da = a - centers * ((r % 3) - 1);
      weights.push(Math.exp(-(dv * dv + da * da) / (2 * sigma * sigma)));
      total += weights[r];
    }
    return weights.map((w) => w / (total || 1));
  };

  const LEVELS = ["low", "middle", "high"];
  vaflow.regionName = (r) => `${LEVELS[Math.floor(r / 3)]} valence, ${LEVELS[r % 3]} arousal`;
  vaflow.regionOf = (v, a, centers) => {
    const level = (x) => (x > -centers / 2) + (x > centers / 2);
    return 3 * level(v) + level(a);
  };
})();
