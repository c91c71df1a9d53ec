"""The pairs that every converted file is scored with: twelve questions in eleven languages, each with a passage that
answers it and one that clearly does not. Written for this project; they measure drift, not quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Sample(NamedTuple):
    language: str
    relevant: bool
    query: str
    passage: str


_QUESTIONS = (  # language, question, a passage that answers it, one that does not
    ("en", "How do I reset the password of my router?",
     "Hold the small button at the back of the router for ten seconds. It restarts with the factory password, which is "
     "printed on the label underneath.",
     "Roll the dough out thinly, cover it with sliced apples and bake it for forty minutes."),
    ("en", "Why do leaves turn red in autumn?",
     "When days grow shorter, trees break down the green chlorophyll, and red anthocyanins become visible in leaves.",
     "The committee moved its monthly meeting to Thursday because of the holiday."),
    ("de", "Wie lange darf man mit einem Anhänger auf der Autobahn am Stück fahren?",
     "Eine feste Obergrenze gibt es für Pkw mit Anhänger nicht; empfohlen wird, spätestens nach zwei Stunden Fahrt "
     "eine Pause einzulegen.",
     "Die Größe der Gemälde in dieser Ausstellung reicht von Postkarten bis zu ganzen Wänden."),
    ("fr", "Quelle est la hauteur du mont Blanc ?",
     "Le mont Blanc, point culminant des Alpes, s'élève à un peu plus de 4 805 mètres d'altitude.",
     "La bibliothèque municipale ferme plus tôt le samedi pendant l'été."),
    ("es", "¿Cómo se conserva el pan fresco durante más tiempo?",
     "Envuelto en un paño de algodón y guardado en una panera, el pan se mantiene tierno dos o tres días; congelado, "
     "varias semanas.",
     "El equipo ganó el partido en los últimos minutos gracias a un gol de cabeza."),
    ("pt", "Qual é o maior rio da América do Sul?",
     "O Amazonas é o maior rio da América do Sul, tanto em extensão como em volume de água.",
     "O novo horário das aulas de dança começa na próxima segunda-feira."),
    ("ru", "Когда был запущен первый искусственный спутник Земли?",
     "Первый искусственный спутник Земли был запущен 4 октября 1957 года.",
     "Для салата нарежьте огурцы и помидоры, добавьте соль и масло."),
    ("zh", "长城有多长？",
     "根据测量，历代长城的总长度超过两万公里，分布在中国北方的许多省份。",
     "这家咖啡店每天早上七点开门，周末休息。"),
    ("ja", "富士山の高さはどのくらいですか。",
     "富士山は標高3776メートルで、日本でいちばん高い山です。",
     "新しい電車の切符は駅の窓口で買うことができます。"),
    ("ko", "한글은 누가 만들었나요?",
     "한글은 15세기에 세종대왕이 백성이 쉽게 글을 읽고 쓰도록 만들었습니다.",
     "내일은 오후부터 비가 오고 바람이 강하게 불겠습니다."),
    ("ar", "ما هي عاصمة المغرب؟",
     "الرباط هي عاصمة المملكة المغربية، وتقع على ساحل المحيط الأطلسي.",
     "يُطهى الأرز على نار هادئة مدة عشرين دقيقة."),
    ("hi", "मनुष्य के शरीर में कितनी हड्डियाँ होती हैं?",
     "एक वयस्क मनुष्य के शरीर में कुल 206 हड्डियाँ होती हैं।",
     "दुकान रविवार को बंद रहती है और सोमवार को दस बजे खुलती है।"),
)  # fmt: skip

SAMPLES = tuple(
    Sample(language, relevant, query, passage)
    for language, query, answer, other in _QUESTIONS
    for relevant, passage in ((True, answer), (False, other))
)


TOKENS_A_SAMPLE = 16


def samples_with(added: Sequence[str]) -> tuple[Sample, ...]:
    """The pairs, and more that hold every token which a fine-tune added: alone, inside a word, before a comma."""
    groups = (added[start : start + TOKENS_A_SAMPLE] for start in range(0, len(added), TOKENS_A_SAMPLE))
    more = (Sample("added", True, " ".join(group), passage_with(group)) for group in groups)
    return (*SAMPLES, *more)


def passage_with(added: Sequence[str]) -> str:
    """A text in which every token stands in each of the places where it must be found."""
    return " ".join(f"about {token} today, a{token}b, {token}{token}." for token in added)
