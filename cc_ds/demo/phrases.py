"""How the Atlas asks its questions, in every language. Pure data, no logic.

`PHRASES[lang][relation]` is a tuple of templates with one slot, `{x}`, for a name out of CLDR; in `name` the slot takes
the English name. Templates at the same index in two languages ask the same thing in the same shape, so index `i` of
English is the `instruction_en` of index `i` elsewhere. Every template is grammatical whatever name fills it: the name
stands in front of a colon, after one, or between a label and a full stop, so that no language has to inflect it, choose
an article or change an ending. The slot is always preceded by a space or by nothing, so that a name is tokenised alike
in every question.

English has twice as many phrasings: the first half runs parallel to the other languages, the second half is what the
base model reads before it is tuned. `{lang}` in the English `name` and `gloss` templates is a language's English name.
"""

from __future__ import annotations

RELATIONS = ("currency", "language", "region", "name")
PHRASINGS = 3  # per relation, parallel in all languages

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "currency": (
            "{x}: which currency?",
            "Which currency is used here: {x}?",
            "Country: {x}. Currency?",
            "{x}: what is its money?",
            "Name the currency: {x}.",
            "Country: {x}. Money?",
        ),
        "language": (
            "{x}: which official language?",
            "Which language is official here: {x}?",
            "Country: {x}. Official language?",
            "{x}: what do officials speak?",
            "Name the official language: {x}.",
            "Country: {x}. Language?",
        ),
        "region": (
            "{x}: which region?",
            "Which part of the world is this in: {x}?",
            "Country: {x}. Region?",
            "{x}: where is it?",
            "Name the region: {x}.",
            "Country: {x}. Where?",
        ),
        "name": (
            "{x}: and in {lang}?",
            "How do you say this in {lang}: {x}?",
            "English: {x}. {lang}?",
        ),
        "gloss": (
            "{x}: and in English?",
            "How do you say this in English: {x}?",
            "{lang}: {x}. English?",
        ),
    },
    "ar": {
        "currency": (
            "{x}: ما العملة؟",
            "ما العملة المستخدمة هنا: {x}؟",
            "البلد: {x}. العملة؟",
        ),
        "language": (
            "{x}: ما اللغة الرسمية؟",
            "ما اللغة الرسمية هنا: {x}؟",
            "البلد: {x}. اللغة الرسمية؟",
        ),
        "region": (
            "{x}: أي منطقة؟",
            "في أي منطقة من العالم يقع هذا البلد: {x}؟",
            "البلد: {x}. المنطقة؟",
        ),
        "name": (
            "{x}: وبالعربية؟",
            "كيف نقول هذا بالعربية: {x}؟",
            "الإنجليزية: {x}. العربية؟",
        ),
    },
    "de": {
        "currency": (
            "{x}: Welche Währung?",
            "Welche Währung gilt hier: {x}?",
            "Land: {x}. Währung?",
        ),
        "language": (
            "{x}: Welche Amtssprache?",
            "Welche Sprache ist hier Amtssprache: {x}?",
            "Land: {x}. Amtssprache?",
        ),
        "region": (
            "{x}: Welche Region?",
            "In welchem Teil der Welt liegt dieses Land: {x}?",
            "Land: {x}. Region?",
        ),
        "name": (
            "{x}: Und auf Deutsch?",
            "Wie sagt man das auf Deutsch: {x}?",
            "Englisch: {x}. Deutsch?",
        ),
    },
    "es": {
        "currency": (
            "{x}: ¿qué moneda?",
            "¿Qué moneda se usa aquí: {x}?",
            "País: {x}. ¿Moneda?",
        ),
        "language": (
            "{x}: ¿qué idioma oficial?",
            "¿Qué idioma es oficial aquí: {x}?",
            "País: {x}. ¿Idioma oficial?",
        ),
        "region": (
            "{x}: ¿qué región?",
            "¿En qué parte del mundo está este país: {x}?",
            "País: {x}. ¿Región?",
        ),
        "name": (
            "{x}: ¿y en español?",
            "¿Cómo se dice esto en español: {x}?",
            "Inglés: {x}. ¿Español?",
        ),
    },
    "hi": {
        "currency": (
            "{x}: कौन-सी मुद्रा?",
            "यहाँ कौन-सी मुद्रा चलती है: {x}?",
            "देश: {x}। मुद्रा?",
        ),
        "language": (
            "{x}: कौन-सी आधिकारिक भाषा?",
            "यहाँ कौन-सी भाषा आधिकारिक है: {x}?",
            "देश: {x}। आधिकारिक भाषा?",
        ),
        "region": (
            "{x}: कौन-सा क्षेत्र?",
            "यह देश दुनिया के किस भाग में है: {x}?",
            "देश: {x}। क्षेत्र?",
        ),
        "name": (
            "{x}: और हिन्दी में?",
            "इसे हिन्दी में कैसे कहेंगे: {x}?",
            "अंग्रेज़ी: {x}। हिन्दी?",
        ),
    },
    "ru": {
        "currency": (
            "{x}: какая валюта?",
            "Какая здесь валюта: {x}?",
            "Страна: {x}. Валюта?",
        ),
        "language": (
            "{x}: какой официальный язык?",
            "Какой язык здесь официальный: {x}?",
            "Страна: {x}. Официальный язык?",
        ),
        "region": (
            "{x}: какой регион?",
            "В каком регионе мира эта страна: {x}?",
            "Страна: {x}. Регион?",
        ),
        "name": (
            "{x}: а по-русски?",
            "Как сказать это по-русски: {x}?",
            "Английский: {x}. Русский?",
        ),
    },
    "sw": {
        "currency": (
            "{x}: sarafu gani?",
            "Sarafu gani hutumika hapa: {x}?",
            "Nchi: {x}. Sarafu?",
        ),
        "language": (
            "{x}: lugha gani rasmi?",
            "Lugha gani ni rasmi hapa: {x}?",
            "Nchi: {x}. Lugha rasmi?",
        ),
        "region": (
            "{x}: eneo gani?",
            "Nchi hii iko sehemu gani ya dunia: {x}?",
            "Nchi: {x}. Eneo?",
        ),
        "name": (
            "{x}: na kwa Kiswahili?",
            "Unasemaje hivi kwa Kiswahili: {x}?",
            "Kiingereza: {x}. Kiswahili?",
        ),
    },
    "th": {
        "currency": (
            "{x}: สกุลเงินอะไร",
            "ที่นี่ใช้สกุลเงินอะไร: {x}",
            "ประเทศ: {x} สกุลเงิน",
        ),
        "language": (
            "{x}: ภาษาราชการอะไร",
            "ที่นี่ใช้ภาษาราชการอะไร: {x}",
            "ประเทศ: {x} ภาษาราชการ",
        ),
        "region": (
            "{x}: ภูมิภาคอะไร",
            "ประเทศนี้อยู่ในภูมิภาคใด: {x}",
            "ประเทศ: {x} ภูมิภาค",
        ),
        "name": (
            "{x}: แล้วภาษาไทยล่ะ",
            "คำนี้ภาษาไทยพูดว่าอย่างไร: {x}",
            "ภาษาอังกฤษ: {x} ภาษาไทย",
        ),
    },
    "tr": {
        "currency": (
            "{x}: Hangi para birimi?",
            "Burada hangi para birimi geçer: {x}?",
            "Ülke: {x}. Para birimi?",
        ),
        "language": (
            "{x}: Hangi resmî dil?",
            "Burada hangi dil resmîdir: {x}?",
            "Ülke: {x}. Resmî dil?",
        ),
        "region": (
            "{x}: Hangi bölge?",
            "Bu ülke dünyanın hangi bölgesindedir: {x}?",
            "Ülke: {x}. Bölge?",
        ),
        "name": (
            "{x}: Ya Türkçesi?",
            "Bu Türkçede nasıl söylenir: {x}?",
            "İngilizce: {x}. Türkçe?",
        ),
    },
    "yo": {
        "currency": (
            "{x}: owó wo?",
            "Owó wo ni wọ́n ń ná níbí: {x}?",
            "Orílẹ̀-èdè: {x}. Owó?",
        ),
        "language": (
            "{x}: èdè ìjọba wo?",
            "Èdè wo ni èdè ìjọba níbí: {x}?",
            "Orílẹ̀-èdè: {x}. Èdè ìjọba?",
        ),
        "region": (
            "{x}: agbègbè wo?",
            "Apá ibo ní ayé ni orílẹ̀-èdè yìí wà: {x}?",
            "Orílẹ̀-èdè: {x}. Agbègbè?",
        ),
        "name": (
            "{x}: ní èdè Yorùbá ńkọ́?",
            "Báwo ni a ṣe ń sọ èyí ní Yorùbá: {x}?",
            "Èdè Gẹ̀ẹ́sì: {x}. Èdè Yorùbá?",
        ),
    },
}
