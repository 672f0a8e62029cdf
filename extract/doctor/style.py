"""The style sheet of a check's page: light and dark, fit to print, colours that differ for every kind of eye."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f7f8f9; --text: #1b1b1b; --soft: #5c5c5c; --line: #d9d9d9;
  --there: #3c8fc4; --part: #a9d0ea; --missing: #e39a1c; --error: #b3261e; --warning: #8a5200; --note: #5c5c5c;
  --train: #0072b2; --val: #c04f00; --test: #6b6b6b; --none: #7a5aa0; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1e2125; --text: #e8e8e8;
  --soft: #a9a9a9; --line: #3a3d41; --there: #4a9fd4; --part: #2c5a78; --missing: #f0b44b; --error: #ff8a80;
  --warning: #f0c24b; --note: #a9a9a9; --train: #5bb4e5; --val: #f0a05a; --test: #9a9a9a; --none: #b79be0; } }
@page { size: landscape; margin: 12mm; }
@media print { :root { color-scheme: light; } body { max-width: none; margin: 0; }
  article, figure { break-inside: avoid; } .wide { overflow: visible; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 2rem auto; padding: 0 1.25rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
ul { padding-left: 1.2rem; margin: .4rem 0; } p { margin: .2rem 0 .5rem; }
.soft { color: var(--soft); font-weight: 400; } .wide { overflow-x: auto; overflow-wrap: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; } .tile span { font-size: .82rem; color: var(--soft); }
.tile.error b { color: var(--error); } .tile.warning b { color: var(--warning); }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: .3rem; padding: 0 .4em;
  font-size: .78rem; white-space: nowrap; } .badge.error { color: var(--error); font-weight: 700; }
.badge.warning { color: var(--warning); } .badge.note { color: var(--note); }
.kind { border-bottom: 1px solid var(--line); padding: .35rem 0; } .kind > :not(summary) { margin-left: 1.1rem; }
.kind summary { cursor: pointer; } .kind .count { background: var(--card); border-radius: 1em; padding: 0 .5em; }
.cost { color: var(--warning); } .kind li { font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--soft); }
th:first-child { text-align: left; font-weight: 400; max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
.clips td:nth-child(5) { width: 34%; min-width: 14rem; } .clips :is(th, td):nth-child(n + 4):nth-child(-n + 5) {
  text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
.figures figcaption { font-weight: 600; font-size: .9rem; }
svg { font: 12px system-ui, sans-serif; } svg.map { width: 400px; max-width: 100%; }
svg.plot { width: 480px; max-width: 100%; } .tick { fill: var(--soft); } .grid { stroke: var(--line); fill: none; }
.frame { fill: none; stroke: var(--line); } .cell { fill: var(--there); } .third { stroke: var(--soft); fill: none;
  stroke-dasharray: 3 3; stroke-width: .7; }
.word, .share { fill: var(--text); paint-order: stroke; stroke: var(--back); stroke-width: 3px;
  stroke-linejoin: round; }
.share { font-size: 14px; font-weight: 700; }
.line { fill: none; stroke-width: 2; } .line.train { stroke: var(--train); }
.line.val { stroke: var(--val); stroke-dasharray: 5 2; } .line.test { stroke: var(--test); stroke-dasharray: 2 2; }
.line.none { stroke: var(--none); stroke-dasharray: 8 2 2 2; }
.legend { color: var(--soft); font-size: .86rem; } .legend span { margin-right: 1.1rem; white-space: nowrap; }
.key { display: inline-block; width: 1.6em; height: .7em; margin-right: .35em; }
.key.train { border-top: 2px solid var(--train); } .key.val { border-top: 2px dashed var(--val); }
.key.test { border-top: 2px dotted var(--test); } .key.none { border-top: 2px dashed var(--none); }
.key.there { background: var(--there); } .key.part { background: var(--part); }
.key.missing { background: var(--missing); height: .35em; }
.key.nothing { border-top: 1px solid var(--line); height: .3em; }
svg.strip { width: 100%; height: 30px; display: block; } .strip .there { fill: var(--there); }
.strip .part { fill: var(--part); } .strip .missing { fill: var(--missing); }
.strip .nothing { stroke: var(--line); stroke-width: 1; fill: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
article svg.strip { margin: .5rem 0; } article li { font-size: .86rem; margin: .15rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; } .pictures img { display: block; border-radius: .25rem; }
.pictures figcaption { font-size: .72rem; color: var(--soft); }
"""
