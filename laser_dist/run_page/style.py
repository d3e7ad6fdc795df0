"""The style sheet of run pages: one set of colours for light, one for dark, chosen to be told apart in both."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2430;--muted:#667085;--edge:#d9dee7;--card:#f7f8fa;
--good:#1a7f4b;--bad:#b42318;--c0:#2f6db5;--c1:#c8651b;--c2:#2a8a5f;--c3:#a3467c;--c4:#7a6a1f;--c5:#5b5bd6;
--p0:#2f6db5;--p1:#c79a3a;--p2:#7a8ca5;--p3:#2a8a5f;--p4:#9aa7bb;--p5:#c8651b;--p6:#b42318;--p7:#e3e7ee}
@media (prefers-color-scheme:dark) {
:root{--bg:#14171c;--fg:#e4e8ee;--muted:#98a2b3;--edge:#343b47;--card:#1b2027;--good:#4cc38a;--bad:#ff7b6b;
--c0:#6ea8e8;--c1:#f0a060;--c2:#5fc796;--c3:#e08abf;--c4:#cdbb5e;--c5:#a3a3ff;--p0:#5b95d6;--p1:#d5ae57;
--p2:#8496b0;--p3:#4fb488;--p4:#66738a;--p5:#e58b48;--p6:#f0695a;--p7:#2c333e}
}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:24px 16px 48px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5em;margin:0 0 .1em;overflow-wrap:anywhere}
h2{font-size:1.15em;margin:1.8em 0 .5em}
h3{font-size:1em;margin:1.2em 0 .4em}
.facts{margin:.2em 0 1.2em;overflow-wrap:anywhere}
.muted,.facts,footer,small{color:var(--muted)}
.good{color:var(--good)}
.bad{color:var(--bad)}
.alarms{border:1px solid var(--bad);border-radius:8px;padding:4px 16px 8px;background:var(--card)}
.alarms h2{margin:.5em 0;color:var(--bad)}
.alarms ul{margin:0;padding-left:1.2em}
.alarms li{margin:.3em 0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:.92em}
td,th{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--edge);vertical-align:top}
th{color:var(--muted);font-weight:600}
td.n,th.n{text-align:right}
td.w{white-space:nowrap}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
tr.sum td{border-bottom:0;font-weight:600}
.scroll{overflow-x:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;padding:10px 12px;border:1px solid var(--edge);border-radius:8px;background:var(--card)}
figcaption{font-weight:600;margin-bottom:4px}
svg{display:block;width:100%;height:auto}
svg text{font:10.5px system-ui,sans-serif;fill:var(--muted)}
.grid{stroke:var(--edge);stroke-width:1}
.line polyline{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke:var(--c)}
.line circle{fill:var(--c)}
.line.other polyline{stroke-width:1.3;stroke-dasharray:4 3;opacity:.85}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85em;color:var(--muted)}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.45em;background:var(--c)}
.bar{height:26px;border-radius:6px;margin-bottom:8px}
.bar rect{fill:var(--c)}
.c0{--c:var(--c0)}
.c1{--c:var(--c1)}
.c2{--c:var(--c2)}
.c3{--c:var(--c3)}
.c4{--c:var(--c4)}
.c5{--c:var(--c5)}
.p0{--c:var(--p0)}
.p1{--c:var(--p1)}
.p2{--c:var(--p2)}
.p3{--c:var(--p3)}
.p4{--c:var(--p4)}
.p5{--c:var(--p5)}
.p6{--c:var(--p6)}
.p7{--c:var(--p7)}
details{margin-top:1.6em}
summary{cursor:pointer;font-weight:600}
footer{margin-top:2.5em;font-size:.85em;overflow-wrap:anywhere}
"""
