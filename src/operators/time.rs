//! Times as `%START_TIME(…)%` writes them: strftime's letters, and fractions of a second. All in UTC.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds, as Envoy writes times that nobody gave a form for.
pub(super) const DEFAULT: &str = "%Y-%m-%dT%H:%M:%S.%3fZ";

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

struct Calendar {
    year: i64,
    /// 1 to 12.
    month: i64,
    day: i64,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: i64,
}

/// Writes `time` in a form; letters that are not known stay as they are.
pub(super) fn write(time: SystemTime, form: &str) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let nanoseconds = since.subsec_nanos();
    let date = calendar(seconds.div_euclid(86_400));
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut out = String::with_capacity(form.len() + 16);
    let mut rest = form.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let Some(letter) = rest.next() else {
            out.push('%');
            break;
        };
        let month = &MONTHS[usize::try_from(date.month - 1).unwrap_or(0).min(11)];
        let weekday = &DAYS[usize::try_from(date.weekday).unwrap_or(0).min(6)];
        // A string takes whatever is written to it.
        let _ = match letter {
            'Y' => write!(out, "{:04}", date.year),
            'y' => write!(out, "{:02}", date.year % 100),
            'm' => write!(out, "{:02}", date.month),
            'd' => write!(out, "{:02}", date.day),
            'e' => write!(out, "{:2}", date.day),
            'j' => write!(out, "{:03}", date.day_of_year),
            'H' => write!(out, "{hour:02}"),
            'I' => write!(out, "{:02}", (hour + 11) % 12 + 1),
            'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            'M' => write!(out, "{minute:02}"),
            'S' => write!(out, "{second:02}"),
            'F' => write!(out, "{:04}-{:02}-{:02}", date.year, date.month, date.day),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            'B' => write!(out, "{month}"),
            'b' | 'h' => write!(out, "{}", &month[..3]),
            'A' => write!(out, "{weekday}"),
            'a' => write!(out, "{}", &weekday[..3]),
            'Z' => write!(out, "UTC"),
            'z' => write!(out, "+0000"),
            's' => write!(out, "{seconds}"),
            'f' => write!(out, "{nanoseconds:09}"),
            '%' => write!(out, "%"),
            digit @ '1'..='9' if rest.as_str().starts_with('f') => {
                rest.next();
                let digits = digit.to_digit(10).unwrap_or(9) as usize;
                write!(out, "{}", &format!("{nanoseconds:09}")[..digits])
            }
            other => write!(out, "%{other}"),
        };
    }
    out
}

/// The Gregorian date of a day since the epoch. Years are counted from March, so that a leap day is a year's
/// last, within eras of 400 years.
fn calendar(days: i64) -> Calendar {
    const ERA: i64 = 146_097;
    /// From the 1st of March of the year 0 to the epoch.
    const TO_EPOCH: i64 = 719_468;
    let shifted = days + TO_EPOCH;
    let (era, day_of_era) = (shifted.div_euclid(ERA), shifted.rem_euclid(ERA));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / (ERA - 1)) / 365;
    let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_from_march + 2) / 153;
    let day = day_from_march - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let leap = i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
    let day_of_year = if month > 2 { day_from_march + 60 + leap } else { day_from_march - 305 };
    Calendar { year, month, day, day_of_year, weekday: (days + 4).rem_euclid(7) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_as_asked() {
        let at = |seconds: u64, nanoseconds: u32| UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        for (time, form, expected) in [
            (at(0, 0), DEFAULT, "1970-01-01T00:00:00.000Z"),
            (at(951_827_696, 123_456_789), DEFAULT, "2000-02-29T12:34:56.123Z"),
            (at(951_868_799, 999_999_999), "%F %T.%6f %f", "2000-02-29 23:59:59.999999 999999999"),
            (at(4_107_542_400, 0), "%a %A %d %b %B %y %j", "Mon Monday 01 Mar March 00 060"),
            (at(1_709_251_199, 0), "%I:%M %p %e %j %Z%z", "11:59 PM 29 060 UTC+0000"),
            (at(1_735_603_200, 5), "%s %1f %% %q %H", "1735603200 0 % %q 00"),
            (at(1_735_603_200, 0), "%j%", "366%"),
            (at(0, 0), "%0 %4 é", "%0 %4 é"),
        ] {
            assert_eq!(write(time, form), expected, "{form}");
        }
    }
}
