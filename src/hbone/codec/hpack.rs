//! Header compression (RFC 7541). Pure. The decoder accepts any input.
//!
//! The encoder has no state: it never adds to a dynamic table and writes strings as they are. The few headers of a
//! CONNECT stream differ for each stream, so there is little to gain.

use super::huffman;
use std::borrow::Cow;
use std::collections::VecDeque;

/// The size of the dynamic table if SETTINGS do not change it (RFC 9113 section 6.5.2). Ours do not.
const TABLE_SIZE: usize = 4096;

/// What each entry of a table and each field of a list counts in addition to its bytes (RFC 7541 section 4.1).
const OVERHEAD: usize = 32;

/// The most that the fields of a block may come to, if no larger list is asked for. Fields in the table cost the peer
/// one byte each, and a name in the table can be copied into a new entry for two bytes. No honest peer comes near this.
const LIST_MAX: usize = 256 * 1024;

/// The static table (RFC 7541 appendix A). Its first index is 1.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// Why a header block cannot be decoded. The tables of both sides differ from then on, so the connection has to end
/// with COMPRESSION_ERROR (RFC 9113 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    /// The block ends within a field.
    #[error("a header block ends within a field")]
    Truncated,
    /// An integer is too large, or has too many bytes (RFC 7541 section 5.1).
    #[error("a header block has an integer that is too large")]
    Integer,
    /// There is no entry with this index (RFC 7541 section 2.3.3).
    #[error("a header block refers to entry {0}, which does not exist")]
    Index(usize),
    /// A string is not valid Huffman code (RFC 7541 section 5.2).
    #[error("a header block has a string that is not valid Huffman code")]
    Huffman,
    /// The size of the dynamic table changes within a block (RFC 7541 section 4.2).
    #[error("a header block changes the size of the dynamic table behind a field")]
    LateUpdate,
    /// The dynamic table would be larger than allowed (RFC 7541 section 6.3).
    #[error("a header block makes the dynamic table larger than allowed")]
    LargeUpdate,
    /// The fields are far larger than any list that is taken. Not an error in the RFC, but it would cost too much to
    /// read the rest.
    #[error("a header block has far too many fields")]
    Bomb,
}

/// A string: a part of the block or of a table, or decoded.
type Text<'a> = Cow<'a, [u8]>;

/// An entry of the dynamic table.
#[derive(Debug)]
struct Entry {
    /// The name, then the value.
    bytes: Box<[u8]>,
    name: usize,
}

impl Entry {
    fn size(&self) -> usize {
        self.bytes.len() + OVERHEAD
    }

    fn field(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at_checked(self.name).unwrap_or_default()
    }
}

/// The dynamic table (RFC 7541 section 2.3.2).
#[derive(Debug)]
struct Table {
    /// The newest entry first.
    entries: VecDeque<Entry>,
    /// The size of all entries.
    size: usize,
    /// The most that `size` may be.
    max: usize,
}

impl Table {
    /// Makes room: the oldest entries go until the rest is at most this large. An empty table takes no memory.
    fn shrink(&mut self, size: usize) {
        while self.size > size
            && let Some(entry) = self.entries.pop_back()
        {
            self.size -= entry.size();
        }
        if self.entries.is_empty() {
            self.entries = VecDeque::new();
        }
    }

    fn resize(&mut self, max: usize) {
        self.max = max;
        self.shrink(max);
    }

    /// Adds an entry. One that is larger than the table empties it (RFC 7541 section 4.4).
    fn add(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + OVERHEAD;
        let Some(left) = self.max.checked_sub(size) else { return self.shrink(0) };
        self.shrink(left);
        self.size += size;
        self.entries.push_front(Entry { bytes: [name, value].concat().into(), name: name.len() });
    }

    /// The field at an index of both tables (RFC 7541 section 2.3.3).
    fn field(&self, index: usize) -> Result<(&[u8], &[u8]), HpackError> {
        let place = index.checked_sub(1).ok_or(HpackError::Index(index))?;
        if let Some((name, value)) = STATIC.get(place) {
            return Ok((name.as_bytes(), value.as_bytes()));
        }
        self.entries.get(place - STATIC.len()).map(Entry::field).ok_or(HpackError::Index(index))
    }
}

/// Decodes the header blocks of a connection. Each block must be decoded, in order, even if nobody needs its fields.
#[derive(Debug)]
pub struct Decoder {
    table: Table,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder for a new connection. The peer may use a table of 4096 bytes.
    pub fn new() -> Self {
        Self { table: Table { entries: VecDeque::new(), size: 0, max: TABLE_SIZE } }
    }

    /// Decodes a block and reports each field. Returns false if the fields together are larger than `list_max` as
    /// RFC 9113 section 6.5.2 counts them; only those before were reported.
    pub fn decode(
        &mut self,
        block: &[u8],
        list_max: usize,
        on_field: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<bool, HpackError> {
        let mut input = self.size_updates(block)?;
        let mut list = 0;
        let mut report = |name: &[u8], value: &[u8]| {
            list += name.len() + value.len() + OVERHEAD;
            if list <= list_max {
                on_field(name, value);
            }
            if list <= LIST_MAX.max(list_max) { Ok(()) } else { Err(HpackError::Bomb) }
        };
        while let Some(first) = input.first().copied() {
            match first {
                // Indexed field (section 6.1).
                0x80.. => {
                    let (name, value) = self.table.field(integer(&mut input, 7)?)?;
                    report(name, value)?;
                }
                // Literal that is added to the table (section 6.2.1).
                0x40.. => {
                    let (name, value) = self.literal(&mut input, 6)?;
                    report(&name, &value)?;
                    let name = name.into_owned();
                    self.table.add(&name, &value);
                }
                0x20.. => return Err(HpackError::LateUpdate),
                // Literal that is not added, whether others may add it or not (sections 6.2.2 and 6.2.3).
                _ => {
                    let (name, value) = self.literal(&mut input, 4)?;
                    report(&name, &value)?;
                }
            }
        }
        Ok(list <= list_max)
    }

    /// The changes of the table's size at the beginning of a block (RFC 7541 section 6.3). Returns the rest.
    fn size_updates<'a>(&mut self, block: &'a [u8]) -> Result<&'a [u8], HpackError> {
        let mut input = block;
        while let Some(0x20..=0x3f) = input.first() {
            let size = integer(&mut input, 5)?;
            if size > TABLE_SIZE {
                return Err(HpackError::LargeUpdate);
            }
            self.table.resize(size);
        }
        Ok(input)
    }

    /// The name and value of a literal. The index of the name has `prefix` bits; 0 means that the name follows.
    fn literal<'a, 'b: 'a>(&'a self, input: &mut &'b [u8], prefix: u32) -> Result<(Text<'a>, Text<'b>), HpackError> {
        let name = match integer(input, prefix)? {
            0 => string(input)?,
            index => Cow::Borrowed(self.table.field(index)?.0),
        };
        Ok((name, string(input)?))
    }
}

fn byte(input: &mut &[u8]) -> Result<u8, HpackError> {
    let (first, rest) = input.split_first().ok_or(HpackError::Truncated)?;
    *input = rest;
    Ok(*first)
}

/// An integer whose first byte has `prefix` bits of it (RFC 7541 section 5.1). At most 2^32-1, in at most six bytes.
fn integer(input: &mut &[u8], prefix: u32) -> Result<usize, HpackError> {
    let mask = (1 << prefix) - 1;
    let first = u64::from(byte(input)?) & mask;
    if first < mask {
        return usize::try_from(first).map_err(|_| HpackError::Integer);
    }
    let mut value = first;
    for shift in [0, 7, 14, 21, 28] {
        let next = byte(input)?;
        value += u64::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            let value = u32::try_from(value).map_err(|_| HpackError::Integer)?;
            return usize::try_from(value).map_err(|_| HpackError::Integer);
        }
    }
    Err(HpackError::Integer)
}

/// A string (RFC 7541 section 5.2).
fn string<'a>(input: &mut &'a [u8]) -> Result<Text<'a>, HpackError> {
    let is_huffman = input.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(input, 7)?;
    let (text, rest) = input.split_at_checked(length).ok_or(HpackError::Truncated)?;
    *input = rest;
    if is_huffman { huffman::decode(text).map(Cow::Owned).map_err(|_| HpackError::Huffman) } else { Ok(text.into()) }
}

/// Appends `:method CONNECT`.
pub fn method_connect(out: &mut Vec<u8>) {
    // The name has index 2.
    literal(2, "CONNECT", out);
}

/// Appends `:authority`.
pub fn authority(value: &str, out: &mut Vec<u8>) {
    // The name has index 1.
    literal(1, value, out);
}

/// Appends `:status`.
pub fn status(status: u16, out: &mut Vec<u8>) {
    let value = status.to_string();
    match (8_u8..).zip(STATIC.iter().skip(7).take(7)).find(|(_, (_, known))| *known == value) {
        Some((index, _)) => out.push(0x80 | index),
        // The name has index 8.
        None => literal(8, &value, out),
    }
}

/// Appends a field. Its name must be in lower case.
pub fn field(name: &str, value: &str, out: &mut Vec<u8>) {
    debug_assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()), "names are in lower case");
    out.push(0);
    put_string(name, out);
    put_string(value, out);
}

/// Appends a literal that is not added to any table. The index of its name is at most 14, so it fits into one byte.
fn literal(name: u8, value: &str, out: &mut Vec<u8>) {
    out.push(name);
    put_string(value, out);
}

fn put_string(text: &str, out: &mut Vec<u8>) {
    let length = text.len();
    match u8::try_from(length) {
        Ok(length) if length < 0x7f => out.push(length),
        _ => {
            out.push(0x7f);
            let mut rest = length - 0x7f;
            while rest >= 0x80 {
                let [.., low] = rest.to_be_bytes();
                out.push(low | 0x80);
                rest >>= 7;
            }
            let [.., low] = rest.to_be_bytes();
            out.push(low);
        }
    }
    out.extend_from_slice(text.as_bytes());
}

#[cfg(any(test, fuzzing))]
impl Decoder {
    /// The size of the dynamic table as the RFC counts it. It takes about as much memory.
    pub fn size(&self) -> usize {
        self.table.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Fields = Vec<(String, String)>;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| u8::try_from(d).unwrap()).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, HpackError> {
        let mut fields = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let whole = decoder.decode(block, 1 << 16, &mut |name, value| fields.push((text(name), text(value))))?;
        assert!(whole);
        Ok(fields)
    }

    fn fields(fields: &[(&str, &str)]) -> Result<Fields, HpackError> {
        Ok(fields.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    #[test]
    fn integers_of_the_rfc() {
        // Appendix C.1. The bits above the prefix belong to something else.
        assert_eq!(integer(&mut &[0xea][..], 5), Ok(10));
        assert_eq!(integer(&mut &[0xff, 0x9a, 0x0a][..], 5), Ok(1337));
        assert_eq!(integer(&mut &[0x2a][..], 7), Ok(42));
    }

    #[test]
    fn integers_have_a_limit() {
        assert_eq!(integer(&mut &[0x7f, 0x80, 0xff, 0xff, 0xff, 0x0f][..], 7), Ok(u32::MAX as usize));
        assert_eq!(integer(&mut &[0x7f, 0x81, 0xff, 0xff, 0xff, 0x0f][..], 7), Err(HpackError::Integer));
        assert_eq!(integer(&mut &[0x7f, 0x80, 0x80, 0x80, 0x80, 0x00][..], 7), Ok(0x7f));
        assert_eq!(integer(&mut &[0x7f, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00][..], 7), Err(HpackError::Integer));
        assert_eq!(integer(&mut &[0x7f, 0x80][..], 7), Err(HpackError::Truncated));
        assert_eq!(integer(&mut &[][..], 7), Err(HpackError::Truncated));
    }

    #[test]
    fn fields_of_the_rfc() {
        // Appendix C.2.
        for (block, name, value, size) in [
            ("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572", "custom-key", "custom-header", 55),
            ("040c 2f73 616d 706c 652f 7061 7468", ":path", "/sample/path", 0),
            ("1008 7061 7373 776f 7264 0673 6563 7265 74", "password", "secret", 0),
            ("82", ":method", "GET", 0),
        ] {
            let mut decoder = Decoder::new();
            assert_eq!(decode(&mut decoder, &hex(block)), fields(&[(name, value)]));
            assert_eq!(decoder.size(), size, "{name}");
        }
    }

    #[test]
    fn requests_of_the_rfc() {
        let plain = [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ];
        let huffman = [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ];
        let start = |scheme, path| {
            vec![(":method", "GET"), (":scheme", scheme), (":path", path), (":authority", "www.example.com")]
        };
        let third = [start("https", "/index.html"), vec![("custom-key", "custom-value")]].concat();
        // Appendices C.3 and C.4.
        for blocks in [plain, huffman] {
            let mut decoder = Decoder::new();
            assert_eq!(decode(&mut decoder, &hex(blocks[0])), fields(&start("http", "/")));
            assert_eq!(decoder.size(), 57);
            let second = [start("http", "/"), vec![("cache-control", "no-cache")]].concat();
            assert_eq!(decode(&mut decoder, &hex(blocks[1])), fields(&second));
            assert_eq!(decoder.size(), 110);
            assert_eq!(decode(&mut decoder, &hex(blocks[2])), fields(&third));
            assert_eq!(decoder.size(), 164);
        }
    }

    #[test]
    fn responses_of_the_rfc_with_evictions() {
        let plain = [
            "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 \
             474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "4803 3330 37c1 c0bf",
            "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970 7738 \
             666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61 6765 3d33 \
             3630 303b 2076 6572 7369 6f6e 3d31",
        ];
        let huffman = [
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 \
             63c7 8f0b 97c8 e9ae 82ae 43d3",
            "4883 640e ffc1 c0bf",
            "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7 \
             b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
        ];
        let rest = |status, date| {
            vec![
                (":status", status),
                ("cache-control", "private"),
                ("date", date),
                ("location", "https://www.example.com"),
            ]
        };
        let (first, last) = ("Mon, 21 Oct 2013 20:13:21 GMT", "Mon, 21 Oct 2013 20:13:22 GMT");
        let cookie = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1";
        let third = [rest("200", last), vec![("content-encoding", "gzip"), ("set-cookie", cookie)]].concat();
        // Appendices C.5 and C.6, which have a table of 256 bytes.
        for blocks in [plain, huffman] {
            let mut decoder = Decoder::new();
            assert_eq!(decode(&mut decoder, &hex("3f e1 01")), fields(&[]));
            assert_eq!(decode(&mut decoder, &hex(blocks[0])), fields(&rest("302", first)));
            assert_eq!(decoder.size(), 222);
            assert_eq!(decode(&mut decoder, &hex(blocks[1])), fields(&rest("307", first)));
            assert_eq!(decoder.size(), 222);
            assert_eq!(decode(&mut decoder, &hex(blocks[2])), fields(&third));
            assert_eq!(decoder.size(), 215);
        }
    }

    #[test]
    fn an_entry_that_is_evicted_for_its_own_new_value_keeps_its_name() {
        // RFC 7541 section 4.4: the name is read before entries go.
        let mut decoder = Decoder::new();
        let block = [&hex("3f 09")[..], b"\x40\x03abc\x01x", b"\x7e\x02yz"].concat();
        assert_eq!(decode(&mut decoder, &block), fields(&[("abc", "x"), ("abc", "yz")]));
        assert_eq!(decoder.size(), 37);
        assert_eq!(decode(&mut decoder, &[0xbe]), fields(&[("abc", "yz")]));
        assert_eq!(decode(&mut decoder, &[0xbf]), Err(HpackError::Index(63)), "the older one is gone");
    }

    #[test]
    fn a_large_entry_empties_the_table() {
        let mut decoder = Decoder::new();
        decode(&mut decoder, b"\x3f\x09\x40\x03abc\x01x").unwrap();
        assert_eq!(decode(&mut decoder, b"\x40\x03abc\x08xxxxxxxx").unwrap().len(), 1);
        assert_eq!(decoder.size(), 0);
        assert_eq!(decoder.table.entries.capacity(), 0);
    }

    #[test]
    fn bad_blocks_are_refused() {
        for (block, error) in [
            (&b"\x80"[..], HpackError::Index(0)),
            (b"\xbe", HpackError::Index(62)),
            (b"\x7e\x01a", HpackError::Index(62)),
            (b"\xff\xff\xff\xff\xff\xff\x00", HpackError::Integer),
            (b"\x40", HpackError::Truncated),
            (b"\x00\x01", HpackError::Truncated),
            (b"\x00\x01a", HpackError::Truncated),
            (b"\x00\x01a\x02b", HpackError::Truncated),
            (b"\x00\x81\xff\x00", HpackError::Huffman),
            (b"\x82\x20", HpackError::LateUpdate),
            (b"\x3f\xe2\x1f", HpackError::LargeUpdate),
        ] {
            assert_eq!(decode(&mut Decoder::new(), block), Err(error), "{block:x?}");
        }
        assert_eq!(decode(&mut Decoder::new(), b"\x3f\xe1\x1f"), fields(&[]), "4096 is allowed");
    }

    #[test]
    fn a_list_that_is_too_large_still_changes_the_table() {
        let mut decoder = Decoder::new();
        let mut names = Vec::new();
        let block = b"\x40\x01a\x01b\x40\x01c\x01d\x82";
        let whole = decoder.decode(block, 34, &mut |name, _| names.push(name.to_vec()));
        assert_eq!(whole, Ok(false));
        assert_eq!(names, [b"a"], "only the fields before the limit");
        assert_eq!(decode(&mut decoder, &[0xbe, 0xbf]), fields(&[("c", "d"), ("a", "b")]));
        let all = decoder.decode(block, 3 * 32 + 14, &mut |_, _| {});
        assert_eq!(all, Ok(true), "a list that just fits");
    }

    #[test]
    fn a_small_block_cannot_expand_without_end() {
        let mut block = vec![0x40, 1, b'a'];
        put_string(&"x".repeat(4000), &mut block);
        block.extend([0xbe; 8000]);
        assert_eq!(Decoder::new().decode(&block, 4096, &mut |_, _| {}), Err(HpackError::Bomb));
        block.truncate(4020);
        assert_eq!(Decoder::new().decode(&block, 4096, &mut |_, _| {}), Ok(false));
    }

    #[test]
    fn the_encoder_writes_the_bytes_of_the_rfc() {
        let mut out = Vec::new();
        method_connect(&mut out);
        authority("a:1", &mut out);
        field("b", "c", &mut out);
        status(200, &mut out);
        status(500, &mut out);
        status(503, &mut out);
        assert_eq!(out, *b"\x02\x07CONNECT\x01\x03a:1\x00\x01b\x01c\x88\x8e\x08\x03503");
    }

    #[test]
    fn long_strings_are_encoded_with_their_length() {
        for length in [0, 1, 126, 127, 128, 254, 255, 4096, 70_000] {
            let mut out = Vec::new();
            put_string(&"x".repeat(length), &mut out);
            let mut input = &out[..];
            assert_eq!(string(&mut input).map(|text| text.len()), Ok(length));
            assert!(input.is_empty());
        }
    }

    /// A random instruction, mostly valid.
    fn instruction() -> impl Strategy<Value = Vec<u8>> {
        let text = || {
            (any::<bool>(), prop::collection::vec(any::<u8>(), 0..60)).prop_map(|(plain, text)| {
                let text = if plain { text } else { huffman::tests::encode(&text) };
                let length = u8::try_from(text.len().min(126)).unwrap();
                [&[length | if plain { 0 } else { 0x80 }], &text[..usize::from(length)]].concat()
            })
        };
        prop_oneof![
            3 => (0x80..=0xd0_u8).prop_map(|byte| vec![byte]),
            4 => (text(), text()).prop_map(|(name, value)| [&[0x40], &name[..], &value].concat()),
            2 => (0x41..=0x7e_u8, text()).prop_map(|(byte, value)| [&[byte], &value[..]].concat()),
            1 => (0..=1_u8, text(), text()).prop_map(|(bit, name, value)| [&[bit << 4], &name[..], &value].concat()),
            1 => (0x20..=0x3e_u8).prop_map(|byte| vec![byte]),
            1 => prop::collection::vec(any::<u8>(), 0..4),
        ]
    }

    proptest! {
        #[test]
        fn any_blocks_are_read_without_a_panic_and_within_the_limit(
            blocks in prop::collection::vec(prop::collection::vec(instruction(), 0..20), 0..8),
        ) {
            let mut decoder = Decoder::new();
            for block in &blocks {
                let mut reported = 0;
                let whole = decoder.decode(&block.concat(), 2000, &mut |name, value| {
                    reported += name.len() + value.len() + OVERHEAD;
                });
                prop_assert!(reported <= 2000);
                let sum: usize = decoder.table.entries.iter().map(Entry::size).sum();
                prop_assert_eq!(sum, decoder.size());
                prop_assert!(decoder.size() <= decoder.table.max && decoder.table.max <= TABLE_SIZE);
                if whole.is_err() {
                    break;
                }
            }
        }

        #[test]
        fn a_table_behaves_like_a_plain_list(
            steps in prop::collection::vec((0..80_usize, 0..80_usize, prop::option::weighted(0.1, 0..1000_usize)), 0..60),
        ) {
            let mut table = Table { entries: VecDeque::new(), size: 0, max: 500 };
            // The newest one last.
            let mut list: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
            for (name, value, resize) in steps {
                let field = (vec![b'n'; name], vec![b'v'; value]);
                match resize {
                    Some(max) => table.resize(max),
                    None => {
                        table.add(&field.0, &field.1);
                        list.push(field);
                    }
                }
                let size = |list: &[(Vec<u8>, Vec<u8>)]| list.iter().map(|(n, v)| n.len() + v.len() + 32).sum::<usize>();
                while size(&list) > table.max {
                    list.remove(0);
                }
                prop_assert_eq!(table.size, size(&list));
                for (place, (name, value)) in list.iter().rev().enumerate() {
                    prop_assert_eq!(table.field(62 + place), Ok((&name[..], &value[..])));
                }
                prop_assert_eq!(table.field(62 + list.len()), Err(HpackError::Index(62 + list.len())));
            }
        }
    }
}
