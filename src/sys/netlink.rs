//! Netlink messages: headers and attributes (sources: netlink(7), linux/netlink.h).

/// Length of a header.
pub const HEADER: usize = 16;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLMSG_ERROR`.
pub const ERROR: u16 = 2;
/// The bits of an attribute's type that are its number, without flags (`NLA_TYPE_MASK`).
const NUMBER: u16 = 0x3fff;

/// Length and type of the first message in `bytes`. `None` if there is none or it is damaged.
pub fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = bytes.get(..4)?.try_into().ok().map(u32::from_ne_bytes)?;
    let kind = bytes.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    let length = usize::try_from(length).ok()?;
    (length >= HEADER).then_some((length, kind))
}

/// The error number in an answer of type [`ERROR`]. 0 means success.
pub fn error(answer: &[u8]) -> Option<i32> {
    let code = answer.get(HEADER..HEADER + 4)?.try_into().ok().map(i32::from_ne_bytes)?;
    code.checked_neg()
}

/// A request of a type with this body. `flags` beside [`REQUEST`] are those of the type.
pub fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend([kind.to_ne_bytes(), (flags | REQUEST).to_ne_bytes()].concat());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// An attribute of a type, which may include flags, with these data.
pub fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + data.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The data of the first attribute with this number. `None` if there is none, or one before it is damaged.
pub fn find(mut attributes: &[u8], number: u16) -> Option<&[u8]> {
    loop {
        let word = |at: usize| attributes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
        let (length, kind) = (usize::from(word(0)?), word(2)?);
        let data = attributes.get(4..length)?;
        if kind & NUMBER == number {
            return Some(data);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_is_cut_or_has_length_0_ends_the_reading() {
        assert_eq!(header(&[]), None);
        assert_eq!(header(&[0; 16]), None, "a length of 0 would never end");
        let mut message = vec![0; 20];
        message[..4].copy_from_slice(&20u32.to_ne_bytes());
        message[4..6].copy_from_slice(&33u16.to_ne_bytes());
        assert_eq!(header(&message), Some((20, 33)));
        assert_eq!(header(&message[..5]), None);
    }

    #[test]
    fn attributes_are_found_whatever_their_flags_and_damaged_ones_end_the_reading() {
        let all = [attribute(1, b"abcde"), attribute(2 | 0x8000, b"x")].concat();
        assert_eq!(all.len(), 12 + 8, "each is padded to four bytes");
        assert_eq!((find(&all, 1), find(&all, 2), find(&all, 3)), (Some(&b"abcde"[..]), Some(&b"x"[..]), None));
        assert_eq!(find(&all[..16], 2), None, "it is cut");
        assert_eq!(find(&[0; 8], 1), None, "a length of 0 would never end");
    }

    #[test]
    fn a_request_has_its_length_type_and_body() {
        let message = request(0x0a10, 0, &[7; 4]);
        assert_eq!((header(&message), &message[16..]), (Some((20, 0x0a10)), &[7; 4][..]));
    }
}
