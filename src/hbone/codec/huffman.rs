//! The Huffman code of header compression (RFC 7541 section 5.2 and appendix B). Pure. Only decoding: this side writes
//! strings as they are.

/// The code, without EOS: for each length in bits, the symbols in the order of their codes.
///
/// This is all that there is to know, because the codes count up: the code behind the last one of a length, with zeros
/// appended, is the first one of the next length. EOS is the very last: 30 ones.
const CODE: [(u32, &[u8]); 21] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
    (19, &[92, 195, 208]),
    (20, &[128, 130, 131, 162, 184, 194, 224, 226]),
    (21, &[153, 161, 167, 172, 176, 177, 179, 209, 216, 217, 227, 229, 230]),
    (
        22,
        &[
            129, 132, 133, 134, 136, 146, 154, 156, 160, 163, 164, 169, 170, 173, 178, 181, 185, 186, 187, 189, 190,
            196, 198, 228, 232, 233,
        ],
    ),
    (
        23,
        &[
            1, 135, 137, 138, 139, 140, 141, 143, 147, 149, 150, 151, 152, 155, 157, 158, 165, 166, 168, 174, 175, 180,
            182, 183, 188, 191, 197, 231, 239,
        ],
    ),
    (24, &[9, 142, 144, 145, 148, 159, 171, 206, 215, 225, 236, 237]),
    (25, &[199, 207, 234, 235]),
    (26, &[192, 193, 200, 201, 202, 205, 210, 213, 218, 219, 238, 240, 242, 243, 255]),
    (27, &[203, 204, 211, 212, 214, 221, 222, 223, 241, 244, 245, 246, 247, 248, 250, 251, 252, 253, 254]),
    (
        28,
        &[
            2, 3, 4, 5, 6, 7, 8, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 30, 31, 127, 220,
            249,
        ],
    ),
    (30, &[10, 13, 22]),
];

/// The string is not a valid encoding: it has EOS in it, or ends with anything but the first ones of EOS, fewer than
/// eight (RFC 7541 section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadString;

/// Decodes a string. The result is at most 8/5 times as long.
pub fn decode(encoded: &[u8]) -> Result<Vec<u8>, BadString> {
    let mut text = Vec::with_capacity(encoded.len() + encoded.len() / 4);
    let mut input = encoded.iter();
    // The next bits, the first one at the top, and how many they are.
    let (mut bits, mut count) = (0_u64, 0_u32);
    loop {
        while count <= 48
            && let Some(byte) = input.next()
        {
            bits |= u64::from(*byte) << (56 - count);
            count += 8;
        }
        // Behind the end come ones, as in valid padding.
        let (length, symbol) = match symbol(bits | (u64::MAX >> count)) {
            Some(found) => found,
            None if count < 8 => return Ok(text),
            None => return Err(BadString),
        };
        if length > count {
            return Err(BadString);
        }
        text.push(symbol);
        bits <<= length;
        count -= length;
    }
}

/// The symbol whose code is at the top of `bits`, with the length of the code. `None` for EOS.
fn symbol(bits: u64) -> Option<(u32, u8)> {
    let mut rest = bits;
    for (length, symbols) in CODE {
        // How many codes of this length there are between the first one and the one in `bits`.
        let place = usize::try_from(rest >> (64 - length)).ok()?;
        if let Some(symbol) = symbols.get(place) {
            return Some((length, *symbol));
        }
        rest -= u64::try_from(symbols.len()).ok()? << (64 - length);
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The lengths of all codes in bits, by symbol, the last one for EOS (RFC 7541 appendix B).
    const LENGTHS: [u32; 257] = [
        13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28,
        28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15,
        6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
        15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22,
        20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23,
        23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22,
        22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26,
        27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27,
        26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
    ];

    /// The code of each symbol, the last one for EOS: the canonical code with these lengths (RFC 7541 section 5.2).
    fn codes() -> Vec<(u32, u32)> {
        let mut order: Vec<usize> = (0..257).collect();
        order.sort_by_key(|symbol| (LENGTHS[*symbol], *symbol));
        let mut codes = vec![(0, 0); 257];
        let (mut next, mut last) = (0_u32, 5);
        for symbol in order {
            next <<= LENGTHS[symbol] - last;
            last = LENGTHS[symbol];
            codes[symbol] = (last, next);
            next += 1;
        }
        codes
    }

    fn bits(symbols: impl IntoIterator<Item = usize>) -> Vec<bool> {
        let codes = codes();
        let code = |symbol: usize| (0..codes[symbol].0).rev().map(move |bit| (symbol, bit));
        symbols.into_iter().flat_map(code).map(|(symbol, bit)| codes[symbol].1 >> bit & 1 == 1).collect()
    }

    fn bytes(bits: &[bool]) -> Vec<u8> {
        bits.chunks(8)
            .map(|byte| (0..8).fold(0, |sum, bit| sum << 1 | u8::from(*byte.get(bit).unwrap_or(&true))))
            .collect()
    }

    /// Encodes a string, with the padding of the RFC.
    pub(in super::super) fn encode(text: &[u8]) -> Vec<u8> {
        bytes(&bits(text.iter().map(|byte| usize::from(*byte))))
    }

    /// A decoder that is too simple to be wrong: it goes bit by bit and compares with each code.
    fn slow(encoded: &[u8]) -> Result<Vec<u8>, BadString> {
        let codes = codes();
        let (mut text, mut code, mut length) = (Vec::new(), 0_u32, 0);
        for bit in encoded.iter().flat_map(|byte| (0..8).rev().map(move |bit| u32::from(byte >> bit & 1))) {
            (code, length) = (code << 1 | bit, length + 1);
            match codes.iter().position(|known| *known == (length, code)) {
                Some(256) => return Err(BadString),
                Some(symbol) => {
                    text.push(u8::try_from(symbol).unwrap());
                    (code, length) = (0, 0);
                }
                None => {}
            }
        }
        if length < 8 && code == (1 << length) - 1 { Ok(text) } else { Err(BadString) }
    }

    #[test]
    fn codes_have_the_values_of_the_rfc() {
        let codes = codes();
        for (symbol, code, length) in [
            (0, 0x1ff8, 13),
            (9, 0xff_ffea, 24),
            (10, 0x3fff_fffc, 30),
            (31, 0xfff_fffb, 28),
            (usize::from(b'0'), 0, 5),
            (usize::from(b'A'), 0x21, 6),
            (usize::from(b'Z'), 0xfd, 8),
            (usize::from(b'\\'), 0x7_fff0, 19),
            (usize::from(b'z'), 0x7b, 7),
            (127, 0xfff_fffc, 28),
            (249, 0xfff_fffe, 28),
            (255, 0x3ff_ffee, 26),
            (256, 0x3fff_ffff, 30),
        ] {
            assert_eq!(codes[symbol], (length, code), "{symbol}");
        }
    }

    #[test]
    fn each_symbol_is_decoded() {
        for symbol in 0..=255 {
            assert_eq!(decode(&encode(&[symbol])), Ok(vec![symbol]));
            assert_eq!(decode(&encode(&[b'a', symbol, symbol])), Ok(vec![b'a', symbol, symbol]));
        }
    }

    #[test]
    fn eos_and_bad_padding_are_refused() {
        let a = bits([usize::from(b'a')]);
        let with = |tail: &[bool]| decode(&bytes(&[&a[..], tail].concat()));
        assert_eq!(with(&[]), Ok(b"a".to_vec()));
        assert_eq!(with(&[true, true, false]), Err(BadString), "padding that is not ones");
        assert_eq!(with(&[true; 11]), Err(BadString), "a whole byte of padding");
        assert_eq!(decode(&bytes(&bits([256, usize::from(b'a')]))), Err(BadString), "EOS");
        assert_eq!(decode(&bytes(&bits([256]))), Err(BadString), "EOS at the end");
        assert_eq!(decode(&[]), Ok(Vec::new()));
        assert_eq!(decode(&[0xff]), Err(BadString), "nothing but padding, a whole byte");
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_as_by_the_slow_decoder(encoded in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(decode(&encoded), slow(&encoded));
        }

        #[test]
        fn ones_are_decoded_as_by_the_slow_decoder(
            text in prop::collection::vec(any::<u8>(), 0..6),
            ones in 0..40_usize,
            tail in prop::collection::vec(any::<bool>(), 0..3),
        ) {
            let mut all = bits(text.into_iter().map(usize::from));
            all.resize(all.len() + ones, true);
            all.extend(tail);
            let encoded = bytes(&all);
            prop_assert_eq!(decode(&encoded), slow(&encoded));
        }

        #[test]
        fn a_string_survives(text in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(decode(&encode(&text)), Ok(text));
        }
    }
}
