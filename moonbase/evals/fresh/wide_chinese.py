"""A WideWorld in Chinese: the same things, names, numbers and addresses, with every line of every page translated.

Pages follow one rule (`Label: value`), so that a dictionary of labels and of the few words that are values does it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from moonbase.agents.worlds.wideworld.facts import KINDS, MONTHS
from moonbase.agents.worlds.world import Page

LABELS = {
    "Area": "面积", "Established": "建制日期", "Climate": "气候", "Budget": "预算", "Population": "人口",
    "Elevation": "海拔",
    "Founded": "创立日期", "Main trade": "主要行业", "Region": "所属地区", "Mayor": "市长", "Born": "出生日期",
    "Occupation": "职业",
    "Patents": "专利数", "Height": "身高", "Birthplace": "出生地", "Employer": "雇主", "School": "母校",
    "Employees": "员工数",
    "Revenue": "营收", "Industry": "产业", "Headquarters": "总部所在地", "Founder": "创始人", "Predecessor": "前身",
    "Students": "学生数",
    "Endowment": "捐赠基金", "Opened": "开办日期", "Main field": "主要学科", "Seat": "所在地", "Rector": "院长",
    "Length": "长度",
    "Launched": "下水日期", "Crew": "船员数", "Type": "船型", "Builder": "建造商", "Home port": "母港",
    "Captain": "船长", "Pages": "页数",
    "Published": "出版日期", "Copies sold": "销量", "Genre": "体裁", "Author": "作者", "Publisher": "出版商",
    "Name": "名称", "Kind": "类别", "Source": "来源", "As of": "截至", "Member of": "所属团体",
    "Registry record": "登记册条目",
    "Earlier edition": "早期版本", "Home page": "主页", "Background": "背景", "Current edition": "现行版本",
    "Next page": "下一页",
    "Previous page": "上一页", "Previous bulletin": "上一期公报",
}
KIND_NAMES = {"region": "地区", "town": "城镇", "person": "人物", "company": "公司", "institute": "院校",
              "vessel": "船只",
              "book": "书籍"}
GROUPS = {"assembly": "议会", "league": "同盟", "circle": "学社", "chamber": "商会", "union": "联合会", "fleet": "船队",
          "library": "文库"}
SOURCES = {"gazetteer": "地名录", "registry": "登记册", "news": "新闻", "archive": "档案"}
CHOICES = {
    "alpine": "高山", "arid": "干旱", "coastal": "沿海", "continental": "大陆性", "humid": "湿润", "temperate": "温和",
    "brewing": "酿造", "fishing": "渔业", "glassmaking": "玻璃制造", "mining": "采矿", "printing": "印刷",
    "shipping": "航运",
    "timber": "木材", "weaving": "纺织", "architect": "建筑师", "botanist": "植物学家", "chemist": "化学家",
    "composer": "作曲家",
    "engineer": "工程师", "historian": "历史学家", "painter": "画家", "surveyor": "测量师", "ceramics": "陶瓷",
    "insurance": "保险",
    "instruments": "仪器", "machinery": "机械", "paper": "造纸", "railways": "铁路", "shipbuilding": "造船",
    "textiles": "纺织品",
    "agriculture": "农学", "astronomy": "天文学", "law": "法学", "linguistics": "语言学", "medicine": "医学",
    "metallurgy": "冶金学",
    "barge": "驳船", "clipper": "快帆船", "ferry": "渡轮", "freighter": "货轮", "icebreaker": "破冰船",
    "tanker": "油轮",
    "trawler": "拖网渔船", "biography": "传记", "drama": "戏剧", "essay": "随笔", "novel": "小说", "poetry": "诗歌",
    "travelogue": "游记",
}
UNITS = {"million marks": "百万马克", "km²": "平方公里", "m": "米", "cm": "厘米"}
RULE = "页面之间有分歧时，以登记册条目为准，不论其日期；没有登记册条目时，以“截至”日期最晚的页面为准。"
_CHATTER = ("{a} 与 {b} 联合举办了展览。", "{a} 的代表团访问了 {b}。", "{a} 的一次会议因雨推迟。",
            "{a} 的一幅画像被拍卖。", "{a} 感谢 {b} 赠书。",
            "读者来信怀念 {a}。", "一条街道以 {a} 命名。", "{a} 否认了有关 {b} 的传言。")
_DATE = re.compile(rf"(\d{{1,2}}) ({'|'.join(MONTHS)}) (\d{{4}})")
_FACT = re.compile(r"([A-Z][A-Za-z ]+): (.*)")
_MEMBERSHIP = re.compile(r"the (.+) (\w+) (<.*>)")
_LISTED = re.compile(r"The (.+) (\w+) \((\d+)\): (<.*>)")


def date(text: str) -> str:
    """4 May 1712 → 1712年5月4日, wherever it stands in a text."""
    return _DATE.sub(lambda found: f"{found[3]}年{MONTHS.index(found[2]) + 1}月{found[1]}日", text)


def value(text: str) -> str:
    """Of a fact: dates, units and words; names and numbers stay."""
    if text in CHOICES:
        return CHOICES[text]
    for unit, zh in UNITS.items():
        if text.endswith(f" {unit}") and text[:1].isdigit():
            return f"{text.removesuffix(f' {unit}')} {zh}"
    return date(text)


def _line(line: str) -> str:
    if found := _LISTED.fullmatch(line):
        return f"{found[1]} {GROUPS.get(found[2], found[2])}（{found[3]}）：{found[4]}"
    found = _FACT.fullmatch(line)
    if not found or found[1] not in LABELS:
        return line
    label, said = found[1], found[2]
    if label == "Member of" and (group := _MEMBERSHIP.fullmatch(said)):
        said = f"{group[1]} {GROUPS[group[2]]} {group[3]}"
    else:
        said = {"Kind": KIND_NAMES, "Source": SOURCES}.get(label, {}).get(said) or value(said)
    return f"{LABELS[label]}: {said}"


def page(english: Page) -> Page:
    """A page in Chinese, at the same address."""
    title, _, body = english.text.partition("\n\n")
    lines = body.split("\n")
    name = next((line.removeprefix("Name: ") for line in lines if line.startswith("Name: ")), None)
    head = title
    if name is not None:
        kind = next(line.removeprefix("Kind: ") for line in lines if line.startswith("Kind: "))
        source = next(line.removeprefix("Source: ") for line in lines if line.startswith("Source: "))
        # The first line tells in English what the facts below tell again.
        lines[0] = f"{name}，{KIND_NAMES[kind]}。来源：{SOURCES[source]}。"
        head = name if source == "gazetteer" else f"{name}（{SOURCES[source]}）"
    elif found := re.fullmatch(r"Members of the (.+) (\w+), page (\d+) of (\d+)", title):
        head = f"{found[1]} {GROUPS[found[2]]} 成员，第 {found[3]} 页，共 {found[4]} 页"
        count = re.search(r"has (\d+) ", lines[0])[1]
        lines[0] = f"{found[1]} {GROUPS[found[2]]} 共有 {count} 个成员。"
    elif found := re.fullmatch(r"Category: (\w+) of (\w+), page (\d+) of (\d+)", title):
        kind = next(kind for kind in KINDS.values() if kind.plural == found[2])
        head = f"分类：{KIND_NAMES[kind.name]} {GROUPS[found[1]]}，第 {found[3]} 页，共 {found[4]} 页"
        lines[0] = f"在册的全部{KIND_NAMES[kind.name]}{GROUPS[found[1]]}。"
    elif found := re.fullmatch(r"Bulletin (\d+), (\w+) (\d+)", title):
        head = f"公报 {found[1]}，{found[3]}年{MONTHS.index(found[2]) + 1}月"
        lines[:2] = [_chatter(line) for line in lines[:2]]
    elif title.endswith(" at home"):
        head = f"{title.removesuffix(' at home')} 主页"
        lines = [f"{title.removesuffix(' at home')} 自己的网页，载有全部数据。"]
    return replace(english, title=head, text="\n".join([head, "", *map(_line, lines)]))


def _chatter(line: str) -> str:
    from moonbase.agents.worlds.wideworld.pages import _CHATTER as english

    for number, template in enumerate(english):
        pattern = re.escape(template).replace(r"\{a\}", "(?P<a>.+)").replace(r"\{b\}", "(?P<b>.+)")
        if found := re.fullmatch(pattern, line):
            return _CHATTER[number].format(**{"b": "", **found.groupdict()})
    return line
