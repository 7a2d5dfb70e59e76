"""What end customers and assistants of Brazilian companies write, and what they are called.

Each function draws from the `Random` that it is given and from nothing else, and by `Random.random` alone, whose values
Python promises to keep: the same seed gives the same texts, on any machine. The people and the companies are made up.
Addresses are in the domain `.example`, which leads nowhere. The digit after the 9 of a mobile number is a 0, which
carriers hand out hardly ever: a test that sends by mistake should reach nobody.
"""

from collections.abc import Sequence
from random import Random
from typing import Final, TypeVar

from kestra.models import Role

_T = TypeVar("_T")

FIRST_NAMES: Final = (
    *("Ana", "Maria", "José", "João", "Antônio", "Francisca", "Carlos", "Paulo", "Adriana", "Juliana", "Márcia"),
    *("Fernanda", "Patrícia", "Aline", "Sandra", "Camila", "Amanda", "Bruna", "Jéssica", "Letícia", "Júlia"),
    *("Luciana", "Vanessa", "Mariana", "Gabriela", "Vera", "Vitória", "Larissa", "Cláudia", "Beatriz", "Luana"),
    *("Lucas", "Luiz", "Pedro", "Marcos", "Luís", "Gabriel", "Rafael", "Daniel", "Marcelo", "Bruno", "Eduardo"),
    *("Felipe", "Rodrigo", "Manoel", "Mateus", "André", "Fábio", "Leandro", "Tiago", "Caio", "Iara", "Conceição"),
)
LAST_NAMES: Final = (
    *("Silva", "Santos", "Oliveira", "Souza", "Rodrigues", "Ferreira", "Alves", "Pereira", "Lima", "Gomes"),
    *("Costa", "Ribeiro", "Martins", "Carvalho", "Almeida", "Lopes", "Soares", "Fernandes", "Vieira", "Barbosa"),
    *("Rocha", "Dias", "Nascimento", "Andrade", "Moreira", "Nunes", "Marques", "Machado", "Mendes", "Freitas"),
    *("Araújo", "Conceição", "Magalhães", "Guimarães", "Simões", "Falcão", "Assunção", "Brandão"),
)
BUSINESSES: Final = (
    *("Padaria", "Clínica Odontológica", "Pet Shop", "Imobiliária", "Barbearia", "Pizzaria", "Autoescola", "Ótica"),
    *("Farmácia", "Oficina Mecânica", "Floricultura", "Academia", "Escola de Inglês", "Confeitaria", "Papelaria"),
    *("Salão de Beleza", "Loja de Móveis", "Açaíteria", "Assistência Técnica", "Clínica Veterinária", "Pousada"),
)
BUSINESS_NAMES: Final = (
    *("Boa Vista", "São Jorge", "Bela Vista", "Ipê Amarelo", "Três Irmãos", "Estação Central", "Pão de Açúcar"),
    *("Nova Esperança", "Santo Antônio", "Sabiá", "Maré Alta", "Girassol", "Vila Madalena", "Recanto", "Avenida"),
)
AREA_CODES: Final = (
    *("11", "12", "13", "15", "16", "19", "21", "22", "24", "27", "31", "32", "34", "41", "43", "47", "48", "51"),
    *("54", "61", "62", "65", "67", "71", "75", "79", "81", "82", "83", "84", "85", "86", "91", "92", "98"),
)
PRODUCTS: Final = (
    *("o plano mensal", "a limpeza", "o pacote completo", "o bolo de cenoura", "a consulta de avaliação", "o kit"),
    *("o corte com barba", "a revisão", "o aparelho", "a pizza grande", "o banho e tosa", "o apartamento de 2 quartos"),
)
DAYS: Final = ("hoje", "amanhã", "segunda", "terça", "quarta", "quinta", "sexta", "sábado")
HOURS: Final = ("8h", "9h30", "10h", "11h15", "13h", "14h30", "15h", "16h45", "17h", "18h30")
PRICES: Final = ("R$ 49,90", "R$ 89,00", "R$ 120,00", "R$ 159,90", "R$ 250,00", "R$ 1.200,00")

USER_TEXTS: Final = (
    *("Oi", "Olá, bom dia!", "Boa tarde, tudo bem?", "Boa noite", "oii", "Oi, vi o anúncio de vocês no Instagram"),
    *(
        "Quanto custa {product}?",
        "qual o valor d{product}??",
        "Vocês têm horário {day}?",
        "Dá pra ser {day} às {hour}?",
    ),
    *("Aceita cartão?", "Pode ser no Pix?", "Vocês parcelam?", "Faz entrega no Centro?", "Onde fica a loja?"),
    *("Meu nome é {person}", "Pode marcar no nome de {person}, por favor", "Vou falar com meu marido e te aviso"),
    *("Ok", "ok obrigada", "Obrigado!", "Perfeito 👍", "kkkk", "Blz", "Sim", "Não", "Pode ser", "Isso mesmo 😊"),
    *("Achei um pouco caro", "Tem desconto à vista?", "Preciso remarcar para {day}", "Não consigo ir {day}, desculpa"),
    *("Já fiz o pagamento, segue o comprovante", "Ainda não recebi o pedido", "Queria falar com um atendente"),
    "Bom dia! Gostaria de saber mais sobre {product}. Vocês atendem aos sábados?\nE qual é o endereço?",
)
ASSISTANT_TEXTS: Final = (
    *(
        "Olá! 😊 Como posso ajudar?",
        "Claro! {Product} sai por {price}.",
        "Temos horário {day} às {hour}. Posso reservar?",
    ),
    *("Prontinho, {person}! Ficou marcado para {day} às {hour}. ✅", "Aceitamos Pix, débito e crédito em até 6x."),
    *(
        "Qual é o seu nome completo, por favor?",
        "Entendi! Vou verificar e já te retorno.",
        "Imagina, estou à disposição!",
    ),
    *("Entregamos na região central, a taxa é de R$ 8,00.", "À vista no Pix tem 5% de desconto. 💚", "Anotado!"),
    *("O atendimento é de segunda a sexta, das 8h às 18h, e aos sábados até as 13h.", "Vou chamar um atendente."),
    "Para {product} temos duas opções:\n1. avulso por {price};\n2. em pacote, com 10% de desconto.\nQual prefere?",
    "Obrigado pelo contato, {person}! Qualquer dúvida sobre {product} é só me chamar por aqui.",
)
FOLLOWUP_TEXTS: Final = (
    *(
        "Oi! Conseguiu pensar na nossa proposta? 😊",
        "Olá, ainda tem interesse em {product}?",
        "Posso ajudar em algo mais?",
    ),
    *("Passando para lembrar que ainda temos horário {day} às {hour}.", "Oi, {person}! Ficou alguma dúvida?"),
    *(
        "Essa condição vale até {day}. Quer que eu reserve para você?",
        "Vou encerrar por aqui. Se precisar, é só chamar!",
    ),
)
SYSTEM_TEXTS: Final = (
    *("Atendente {person} assumiu a conversa.", "Conversa devolvida ao assistente.", "Conversa transferida."),
    *("Mensagem apagada pelo remetente.", "Agendamento confirmado para {day} às {hour}."),
)
SUMMARIES: Final = (
    "{person} perguntou por {product} e pelo horário de {day} às {hour}. Recebeu o preço, {price}, e vai confirmar.",
    "Pediu desconto em {product}; oferecidos 5% no Pix. Prefere ser atendida {day}.",
    "Cliente antigo, {person}. Remarcou para {day} às {hour} e pagou {price} no Pix.",
)
DOCUMENTS: Final = (
    ("cardápio.pdf", "application/pdf"),
    ("tabela de preços.pdf", "application/pdf"),
    ("catálogo verão.pdf", "application/pdf"),
    ("perguntas frequentes.docx", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
    ("estoque.xlsx", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
    ("fachada.jpg", "image/jpeg"),
    ("horários.txt", "text/plain"),
)
MEDIA_EXTENSIONS: Final = ("ogg", "ogg", "jpg", "jpg", "mp4", "pdf", "webp")
LINES: Final = 10_000_000
"""How many mobile numbers there are in each area."""

_TEXTS: Final[dict[Role, Sequence[str]]] = {"user": USER_TEXTS, "assistant": ASSISTANT_TEXTS, "system": SYSTEM_TEXTS}


def pick(random: Random, items: Sequence[_T]) -> _T:
    """One of the items, each as often as any other."""
    return items[int(random.random() * len(items))]


def below(random: Random, end: int) -> int:
    """A number from 0 up to, and without, the end; exact for ends up to 2⁵³."""
    return int(random.random() * end)


def digits(random: Random, length: int) -> str:
    """So many decimal digits, the first of which is no 0."""
    rest = "".join(str(below(random, 10)) for _ in range(length - 1))
    return f"{1 + below(random, 9)}{rest}"


def hexadecimal(random: Random, length: int) -> str:
    """So many hexadecimal digits in lower case; `length` is a multiple of 8."""
    return "".join(f"{below(random, 1 << 32):08x}" for _ in range(length // 8))


def person(random: Random) -> str:
    """A first name and a last name."""
    return f"{pick(random, FIRST_NAMES)} {pick(random, LAST_NAMES)}"


def company(random: Random) -> str:
    """What a client is called."""
    name = pick(random, BUSINESS_NAMES if random.random() < 0.5 else LAST_NAMES)  # noqa: PLR2004  # every other one
    return f"{pick(random, BUSINESSES)} {name}"


def mobile(area_code: str, line: int) -> str:
    """The mobile number of a line, 0 to `LINES` - 1: with the country's code and without a plus, as in WhatsApp."""
    return f"55{area_code}90{line:07d}"


def phone_number(random: Random) -> str:
    """Some mobile number; two of many may be the same."""
    return mobile(pick(random, AREA_CODES), below(random, LINES))


def linked_id(random: Random) -> str:
    """A chat whose phone number WhatsApp hides (`…@lid`)."""
    return f"{digits(random, 15)}@lid"


def group_id(random: Random) -> str:
    """The chat of a group (`…@g.us`)."""
    return f"120363{digits(random, 12)}@g.us"


def provider_message_id(random: Random) -> str:
    """What WhatsApp calls a message; no two are the same."""
    return f"wamid.{hexadecimal(random, 32).upper()}"


def instance_token(random: Random) -> str:
    """The token of a Uazapi instance; no two are the same."""
    token = hexadecimal(random, 32)
    return f"{token[:8]}-{token[8:12]}-{token[12:16]}-{token[16:20]}-{token[20:]}"


def phone_number_id(random: Random) -> str:
    """What Meta calls the phone number of a business; two of many millions may be the same."""
    return digits(random, 15)


def filled(random: Random, template: str) -> str:
    """The text, with something in each of its places."""
    if "{" not in template:
        return template
    product = pick(random, PRODUCTS)
    return template.format(
        product=product,
        Product=product[0].upper() + product[1:],
        day=pick(random, DAYS),
        hour=pick(random, HOURS),
        price=pick(random, PRICES),
        person=pick(random, FIRST_NAMES),
    )


def text(random: Random, role: Role) -> str:
    """What somebody says in a conversation."""
    return filled(random, pick(random, _TEXTS[role]))


def followup_text(random: Random) -> str:
    """What the assistant says to an end customer who has fallen silent."""
    return filled(random, pick(random, FOLLOWUP_TEXTS))


def summary(random: Random) -> str:
    """What an assistant remembers of a conversation."""
    return filled(random, pick(random, SUMMARIES))


def system_prompt(random: Random, name: str) -> str:
    """What the assistant of a company is told first."""
    return (
        f"Você é {pick(random, FIRST_NAMES)}, da equipe de atendimento de {name}. Responda em português, em mensagens "
        f"curtas e cordiais. O mais procurado é {pick(random, PRODUCTS)}, por {pick(random, PRICES)}. Não invente "
        "preços nem horários; se não souber, chame um atendente."
    )


def media_url(random: Random) -> str:
    """Where a medium of a message is."""
    return f"https://midia.example/{hexadecimal(random, 32)}.{pick(random, MEDIA_EXTENSIONS)}"


def google_file_uri(random: Random) -> str:
    """Where Google keeps an uploaded file."""
    return f"https://generativelanguage.example/v1beta/files/{hexadecimal(random, 16)}"
