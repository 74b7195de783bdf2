"""The words of the page and of the picture, in English and in Chinese."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Captions:
    """One language. Braces are filled in by the page."""

    lang: str
    title: str
    intro: str
    matrix: str
    matrix_text: str
    step: str
    now: str
    kept: str
    done: str
    masked: str
    computed: str
    reused: str
    uncached: str
    queries: str
    queries_text: str
    proof: str
    proof_text: str
    proof_columns: tuple[str, str, str]
    proof_rows: tuple[str, str, str]
    proof_holds: str
    proof_fails: str
    stepwise: str
    cost: str
    cost_text: str
    cost_columns: tuple[str, str, str]
    cost_rows: tuple[str, str, str, str]
    query_axis: str
    key_axis: str
    picture_about: str
    picture_now: str
    picture_kept: str
    picture_change: str


ENGLISH = Captions(
    lang="en",
    title="Why keys and values are cached, and queries are not",
    intro=(
        "A language model writes one token at a time. In each attention head every token makes three vectors: "
        "a <b>query</b>, what it looks for; a <b>key</b>, what it can be found by; and a <b>value</b>, what it "
        "hands over. The newest token's query is compared with the keys of all tokens so far. The comparisons "
        "become weights that add up to 1, and the values, mixed by these weights, are what the head passes on."
    ),
    matrix="One head at work",
    matrix_text=(
        "Layer {layer}, head {head} of {model}. Row: the token that asks. Column: the token that is looked at. "
        "The darker a cell, the larger its share of the row. Move the slider to write the text token by token."
    ),
    step="Step",
    now="computed in this step",
    kept="keys and values read from the cache",
    done="rows of earlier steps: finished, never needed again",
    masked="hidden by the causal mask: a token cannot see later ones",
    computed="“{token}” makes 1 query, 1 key and 1 value.",
    reused="{n} keys and {n} values of earlier tokens come from the cache.",
    uncached="Without a cache, {n} queries, keys and values would be computed in this step.",
    queries="Why not queries?",
    queries_text=(
        "Look along a row: query <i>i</i> makes row <i>i</i>, in its own step, and no other row ever. Look "
        "down a column: key <i>j</i> and value <i>j</i> are read by their own row and by every row below it. "
        "So a key or a value that is kept saves work in each later step, and a query that is kept saves "
        "nothing."
    ),
    proof="Do earlier tokens really not change?",
    proof_text=(
        "The text was run with and without its last token “{token}”, and the numbers of the {n} tokens before "
        "it compared, over all layers and heads: once with the causal mask, and once with the mask taken away. "
        "The figures are the largest change, as a share of the largest number."
    ),
    proof_columns=("the earlier tokens'", "with the causal mask", "without it"),
    proof_rows=("attention weights", "keys", "values"),
    proof_holds=(
        "With the mask nothing changes but by rounding, so what was computed once can be kept. Without it "
        "every earlier token would see the new one, its numbers would change from the second layer on, and a "
        "cache would hold stale ones."
    ),
    proof_fails="With the mask more changes here than rounding explains: on this model a cache would not be exact.",
    stepwise=(
        "Decoded step by step on the cache, the text gives the same logits as computed whole, but for "
        "{difference} of the largest logit."
    ),
    cost="What it costs and what it saves",
    cost_text="For this text of {n} tokens, in each layer:",
    cost_columns=("", "with the cache", "without it"),
    cost_rows=("keys and values computed", "queries computed", "kept, in all {layers} layers", "kept for 1,000 tokens"),
    query_axis="the token that asks (query)",
    key_axis="the token that is looked at (key, value)",
    picture_about="{model} · layer {layer}, head {head}",
    picture_now="this step",
    picture_kept="read from the cache",
    picture_change="change of earlier tokens' values\nwhen the last token is added",
)

CHINESE = Captions(
    lang="zh",
    title="为什么缓存键和值，而不缓存查询",
    intro=(
        "语言模型一次写出一个词元。在每个注意力头里，每个词元产生三个向量：<b>查询</b>（它在找什么）、<b>键</b>"
        "（别人凭什么找到它）和<b>值</b>（它交出什么）。最新词元的查询与至今所有词元的键逐一比较，比较结果变成"
        "总和为 1 的权重；按这些权重混合的值，就是这个头的输出。"
    ),
    matrix="一个注意力头的工作",
    matrix_text=(
        "{model} 的第 {layer} 层、第 {head} 个头。行：提问的词元；列：被查看的词元。颜色越深，权重越大。拖动滑"
        "块，逐个词元地写出文本。"
    ),
    step="步骤",
    now="本步计算",
    kept="从缓存读取的键和值",
    done="之前各步的行：已完成，不再需要",
    masked="被因果掩码遮住：词元看不到后面的词元",
    computed="“{token}”产生 1 个查询、1 个键和 1 个值。",
    reused="之前词元的 {n} 个键和 {n} 个值来自缓存。",
    uncached="没有缓存时，这一步要计算 {n} 个查询、键和值。",
    queries="为什么不缓存查询？",
    queries_text=(
        "沿着一行看：查询 <i>i</i> 只在自己的那一步产生第 <i>i</i> 行，此后再也用不到。沿着一列往下看：键 "
        "<i>j</i> 和值 <i>j</i> 被自己的行以及下面的每一行读取。所以保存键和值，以后每一步都省下计算；保存查询"
        "，什么也省不了。"
    ),
    proof="之前的词元真的不变吗？",
    proof_text=(
        "把文本分别在有、没有最后一个词元“{token}”的情况下运行，比较它之前 {n} 个词元在所有层、所有头中的数值："
        "一次带因果掩码，一次去掉掩码。表中是最大变化，以占最大数值的比例表示。"
    ),
    proof_columns=("之前词元的", "有因果掩码", "没有掩码"),
    proof_rows=("注意力权重", "键", "值"),
    proof_holds=(
        "有掩码时，除舍入误差外什么都不变，所以算过一次就可以保存。没有掩码时，之前的每个词元都会看到新词元，从"
        "第二层起数值就会改变，缓存里的内容就过期了。"
    ),
    proof_fails="有掩码时的变化也超过了舍入误差：在这个模型上，缓存不会精确。",
    stepwise="在缓存上逐步解码，得到的 logits 与整体计算相同，差别只有最大 logit 的 {difference}。",
    cost="代价与节省",
    cost_text="对这段 {n} 个词元的文本，每一层：",
    cost_columns=("", "有缓存", "没有缓存"),
    cost_rows=("计算的键和值", "计算的查询", "保存的字节（全部 {layers} 层）", "1,000 个词元保存的字节"),
    query_axis="提问的词元（查询）",
    key_axis="被查看的词元（键、值）",
    picture_about="{model} · 第 {layer} 层，第 {head} 个头",
    picture_now="本步",
    picture_kept="从缓存读取",
    picture_change="加入最后一个词元时\n之前词元的值的变化",
)

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
